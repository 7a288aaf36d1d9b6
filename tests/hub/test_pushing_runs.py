import pytest
from publishing_runs import train_and_publish


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_smoke(online, hub, tmp_path, strategy):
    name = f"alice/smoke-{strategy}"
    trainer = train_and_publish(tmp_path / "run", hub_model_id=name, hub_strategy=strategy, hub_tag_steps=True)
    print(hub.store.titles(name))
    print(hub.store.paths(name))
    print(trainer.publisher.report())
    print([r.line for r in hub.requests()])
    print(sorted(p.name for p in (tmp_path / "run").iterdir()))
