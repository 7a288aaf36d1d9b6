"""The article that the methods follow, as cards and pages cite it."""

ADDRESS = "https://llm-random.github.io/posts/neuron_recycling/"
CITATION = f"""@misc{{krajewski2023neuron,
  title  = {{Neuron Recycling}},
  author = {{Krajewski, Jakub and Pi{{\\'o}}ro, Maciej and Jaszczur, Sebastian and Cygan, Marek}},
  year   = {{2023}},
  url    = {{{ADDRESS}}}
}}"""
