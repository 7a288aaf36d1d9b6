"""Which models compute plain masked or causal cross entropy for certain, so that an equal loss may take its place.

Plain: the mean, over the labels that are not -100, of the cross entropy of the logits that the model returns; a causal
model's labels are first moved by one. Only classes of transformers are known to do so, and only in the forward that
they came with.
"""

import inspect
from collections.abc import Callable
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_peft_available

from hf_recycle.internals.of_accelerate import has_forward_of_accelerate
from hf_recycle.internals.of_torch import forward_hooks
from hf_recycle.mlm.causal_classes import CHANGED_LOGITS, LOGITS_OF_THE_HEAD
from hf_recycle.utils.forwards import Forward

_FAMILIES = """
Albert Bert BigBird Camembert ConvBert Data2VecText Deberta DebertaV2 DistilBert Electra Ernie Esm FNet Funnel Gte IBert
JinaEmbeddingsV3 LayoutLM Longformer MPNet MegatronBert MobileBert Mra NomicBert Nystromformer Reformer RemBert RoCBert
RoFormer Roberta RobertaPreLayerNorm SqueezeBert Tapas XLMRoberta XLMRobertaXL Xmod Yoso
"""
IN_FORWARD = frozenset(
    {*(f"{family}ForMaskedLM" for family in _FAMILIES.split()), "FlaubertWithLMHeadModel", "XLMWithLMHeadModel"}
)
"""Classes whose forward has the loss in it. It takes `**kwargs`, but makes nothing of `num_items_in_batch`."""

BY_LOSS_FUNCTION = frozenset({"EsmcForMaskedLM", "EuroBertForMaskedLM", "ModernBertForMaskedLM"})
"""Classes whose forward calls the model's `loss_function`, which divides by `num_items_in_batch`."""

WITH_ANOTHER_LOSS = frozenset(
    {
        "AlbertForPreTraining",
        "BertForPreTraining",
        "BigBirdForPreTraining",
        "ErnieForPreTraining",
        "FNetForPreTraining",
        "LukeForMaskedLM",
        "MegatronBertForPreTraining",
        "MobileBertForPreTraining",
    }
)
"""Classes that add a second loss to masked cross entropy. They make nothing of `num_items_in_batch` either."""


def core_model(model: nn.Module) -> nn.Module:
    """The model whose forward computes the loss: `model` itself, or the one in a PEFT model that only passes on."""
    if not is_peft_available():
        return model
    from peft import PeftModel

    # Other classes and prompts change what goes in or comes out, and so may the tuners that they call.
    if not isinstance(model, PeftModel) or type(model).forward is not PeftModel.forward:
        return model
    return model if model.active_peft_config.is_prompt_learning else cast(nn.Module, model.base_model.model)


def plain_loss_of(model: nn.Module) -> Literal["mlm", "clm"] | None:
    """The task whose plain cross entropy the (unwrapped) `model` returns for certain as its loss, or None."""
    core = core_model(model)
    if not (is_untouched(model) and is_untouched(core)):
        return None
    name = _forward_of(core)
    if name in BY_LOSS_FUNCTION:
        # With ModernBERT's `sparse_prediction` the logits are of some positions only.
        plain = core.loss_function is ForMaskedLMLoss and not getattr(core.config, "sparse_prediction", False)
        return "mlm" if plain else None
    if name in LOGITS_OF_THE_HEAD | CHANGED_LOGITS:
        # Mixtures of experts add the loss of their router then.
        plain = core.loss_function is ForCausalLMLoss and not getattr(core.config, "output_router_logits", False)
        return "clm" if plain else None
    if name not in IN_FORWARD:
        return None
    # DistilBERT's criterion is an attribute; XLM may have an adaptive softmax.
    plain = _is_plain(getattr(core, "mlm_loss_fct", None)) and not getattr(core.config, "asm", False)
    return "mlm" if plain else None


def feeds_its_head_to_the_loss(model: nn.Module) -> bool:
    """Whether the logits of the (unwrapped) causal language model are what its output layer gives, nothing done to
    them: no soft cap, no scale."""
    return plain_loss_of(model) == "clm" and _forward_of(core_model(model)) in LOGITS_OF_THE_HEAD


def ignores_item_count(model: nn.Module) -> bool:
    """Whether the (unwrapped) `model` is known to average its loss over its own batch, although its forward takes
    `**kwargs`, which the Trainer takes for a sign of the contrary.

    So do the classes `WITH_ANOTHER_LOSS`, and a module of the user's around one of them or of `IN_FORWARD` that does
    not name `num_items_in_batch`."""
    if isinstance(model, PreTrainedModel):
        return is_untouched(model) and _forward_of(model) in WITH_ANOTHER_LOSS
    if hasattr(model, "accepts_loss_kwargs") or "num_items_in_batch" in inspect.signature(model.forward).parameters:
        return False
    return any(_forward_of(module) in IN_FORWARD | WITH_ANOTHER_LOSS for module in model.modules())


def honours_item_count(model: nn.Module) -> bool:
    """Whether the (unwrapped) `model` is known to divide its loss by `num_items_in_batch`."""
    return _forward_of(core_model(model)) in BY_LOSS_FUNCTION


def is_masked_language_model(model: nn.Module) -> bool:
    """Whether the (unwrapped) `model`, or a model in it, looks like an encoder trained by masked language modelling."""
    return any(_looks_masked(module) for module in model.modules() if hasattr(module, "config"))


def _looks_masked(module: nn.Module) -> bool:
    if getattr(module.config, "is_encoder_decoder", False):
        return False
    names = {base.__name__ for base in type(module).__mro__}
    known = names & (WITH_ANOTHER_LOSS | set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()))
    return bool(known) or any(name.endswith("ForMaskedLM") for name in names)


def has_known_forward(model: nn.Module) -> bool:
    """Whether `model` has the forward, as it came, of a class of transformers with plain masked cross entropy."""
    return _forward_of(model) in IN_FORWARD | BY_LOSS_FUNCTION


def comes_with_a_library(module: nn.Module) -> bool:
    """Whether `module` computes what its class, which is no class of the user's, computes."""
    libraries = ("transformers.", "torch.", "hf_recycle.")
    return type(module).forward.__module__.startswith(libraries) and _class_forward_is_used(module)


def _forward_of(module: nn.Module) -> str | None:
    """The name of transformers' class whose forward `module` has."""
    forward = type(module).forward
    name = forward.__qualname__.removesuffix(".forward")
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    ours = forward.__module__.startswith("transformers.models.") and owner.__name__ == name
    return name if ours and owner.__module__ == forward.__module__ and _class_forward_is_used(module) else None


def _class_forward_is_used(module: nn.Module) -> bool:
    """Accelerate replaces the forward of an instance to convert dtypes, and we do to save time; nobody else may."""
    own = vars(module).get("forward")
    if isinstance(own, Forward):
        return True
    return own is None or has_forward_of_accelerate(module)


def is_untouched(model: nn.Module) -> bool:
    """Whether nothing of the user's comes before or after the forward of `model`."""
    return type(model).__call__ is nn.Module.__call__ and all(map(is_hook_of_a_library, forward_hooks(model)))


_LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", __name__.partition(".")[0])


def is_hook_of_a_library(hook: Callable) -> bool:
    """Whether a hook is of one of the libraries that train a model, and not the user's."""
    function = getattr(hook, "func", hook)  # of a partial
    return (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0] in _LIBRARIES


def _is_plain(criterion: nn.Module | None) -> bool:
    return criterion is None or (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and (criterion.ignore_index, criterion.reduction, criterion.label_smoothing) == (-100, "mean", 0.0)
    )
