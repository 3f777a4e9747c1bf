"""4-bit models through transformers' own door, without bitsandbytes.

    from halfbyte import BitsAndBytesConfig model = AutoModelForCausalLM.from_pretrained(name,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))

The configuration has bitsandbytes' name and settings; the layers stay ``torch.nn.Linear`` with
weights of ours. What ``save_pretrained`` writes is bitsandbytes' layout and says so in
``config.json``, since files that named this package could not be read without it. Where
bitsandbytes is not installed, its checkpoints are read this way, too, from the import of this
module on.
"""

import importlib.util
import warnings
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..codebooks import BNB_QUANT_TYPES
from ..errors import UsageError
from ..progress import to_stderr
from .bnb_format import STATE_KEY, components, from_components
from .experts import coverage, expert_weights, use_held_experts
from .params4bit import parameter
from .tensor import NF4Tensor, quantize

NAME = "halfbyte"
# their annotations are narrower than what they take
_Config: Any = transformers.BitsAndBytesConfig
_Quantizer: Any = HfQuantizer
_Operation: Any = ConversionOps


@register_quantization_config(NAME)
class BitsAndBytesConfig(_Config):
    """transformers' ``BitsAndBytesConfig`` for 4 bits, which needs no bitsandbytes.

    Raises:
        ValueError: load_in_8bit, or a quant_type that bitsandbytes does not have.
    """

    def __init__(
        self, load_in_8bit: bool = False, load_in_4bit: bool = True, **settings: Any
    ) -> None:
        super().__init__(load_in_8bit, load_in_4bit, **settings)
        self.quant_method = NAME

    def post_init(self) -> None:
        if not self.load_in_4bit or self.load_in_8bit:
            raise ValueError("halfbyte's BitsAndBytesConfig is for load_in_4bit")
        if self.bnb_4bit_quant_type not in BNB_QUANT_TYPES:
            raise ValueError(
                f"bnb_4bit_quant_type must be one of {', '.join(BNB_QUANT_TYPES)}, not "
                f"{self.bnb_4bit_quant_type!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "quant_method": "bitsandbytes"}


class _Quantize(_Operation):
    """A weight as it is in a checkpoint to one in 4 bits."""

    def __init__(self, quantizer: "FourBitQuantizer") -> None:
        self.quantizer: Any = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, **others: Any
    ) -> dict[str, Any]:
        settings = self.quantizer.quantization_config
        result = {}
        for name, given in input_dict.items():
            value: Tensor = given[0] if isinstance(given, list) else given
            if name in self.quantizer.transposed:
                value = value.T
            made = quantize(
                value,
                double_quant=settings.bnb_4bit_use_double_quant,
                quant_type=settings.bnb_4bit_quant_type,
            )
            result[name] = parameter(made, settings.bnb_4bit_compute_dtype or value.dtype)
            _is_there(model, name)
        return result


class _Deserialize(_Operation):
    """What bitsandbytes stores for a weight to one of ours, bit for bit."""

    def __init__(self, quantizer: "FourBitQuantizer") -> None:
        self.quantizer: Any = quantizer
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        if len(input_dict) == 1:
            return input_dict
        stored = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        tensor = from_components("weight", stored)
        _is_there(model, full_layer_name or "")
        dtype = self.quantizer.quantization_config.bnb_4bit_compute_dtype or tensor.dtype
        return {"weight": parameter(tensor, dtype)}


def _is_there(model: Any, name: str) -> None:
    """transformers initializes the modules that nothing was loaded for."""
    if model is not None and name:
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True


@register_quantizer(NAME)
class FourBitQuantizer(_Quantizer):
    """Holds the linear layers of a model and its experts in 4 bits, all but its output head, or all
    but what the settings skip."""

    requires_calibration = False
    quantization_config: Any
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": [
            *(
                "weight",
                "weight.nested_absmax",
                "weight.nested_quant_map",
                "weight.quant_map",
                "weight.absmax",
            ),
            *(f"weight.{STATE_KEY}{quant_type}" for quant_type in BNB_QUANT_TYPES),
        ]
    }

    def __init__(self, quantization_config: Any, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        self.names: set[str] = set()
        self.transposed: set[str] = set()
        self.experts: set[str] = set()

    @property
    def quantized_element_size(self) -> float:
        return 0.5

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> Any:
        # by transformers' own rule, so that bitsandbytes holds the same layers when it reads what
        # is written
        skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, skipped):
                continue
            if isinstance(module, Conv1D):  # GPT-2's linear layer, its weight the other way round
                model.set_submodule(name, _linear_of(module))
                self.transposed.add(f"{name}.weight")
            if type(module) in (nn.Linear, Conv1D):
                self.names.add(f"{name}.weight")
            if not self.pre_quantized:
                self.experts |= {f"{name}.{own}" for own in expert_weights(module)}
        self.names |= self.experts
        if self.experts:
            use_held_experts(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **others: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialize}

    # transformers before 5.20 or so asks otherwise
    if not hasattr(HfQuantizer, "get_load_operations"):

        def get_weight_conversions(self) -> list[Any]:
            if not self.pre_quantized:
                return []
            weight, *others = self.serialized_names["weight"]
            return [WeightConverter([*others, weight], weight, [_Deserialize(self)])]

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> Any:
        model.is_loaded_in_4bit = True
        if self.experts:
            to_stderr(coverage(model))
        if not any(isinstance(p, NF4Tensor) for p in model.parameters()):
            warnings.warn(
                f"no layer of this {type(model).__name__} is in 4 bits: it has no torch.nn.Linear "
                "that the settings do not skip",
                stacklevel=2,
            )
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with ordinary weights of the values that the 4-bit ones stand for."""
        for module in model.modules():
            for name, p in module._parameters.items():
                if isinstance(p, NF4Tensor):
                    module._parameters[name] = nn.Parameter(
                        p.dequantize(dtype), requires_grad=False
                    )
        model.is_loaded_in_4bit = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: 4-bit weights as bitsandbytes stores them."""
        found: dict[str, Tensor] = {}
        adapted = [n for n, module in model.named_modules() if hasattr(module, "lora_A")]
        if adapted:
            raise UsageError(
                f"this model has an adapter ({adapted[0]}, ...), which a checkpoint of its base "
                "could not hold",
                ways_out=[
                    "halfbyte.merge writes one whole model",
                    "halfbyte.export(..., 'bnb-4bit') base and adapter",
                ],
            )
        stacked = [n for n, p in model.named_parameters() if _is_stacked(p)]
        if stacked:
            raise UsageError(
                f"this model has experts in 4 bits ({stacked[0]}, ...), for which bitsandbytes "
                "has no form in a checkpoint",
                ways_out=[
                    "save_pretrained of PEFT's model writes the adapter alone",
                    "halfbyte.merge writes one whole model of it and of its base",
                ],
            )
        for name, tensor in model.state_dict().items():
            found.update(
                components(name, tensor) if isinstance(tensor, NF4Tensor) else {name: tensor}
            )
        return found, {"format": "pt"}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _is_stacked(p: Tensor) -> bool:
    return isinstance(p, NF4Tensor) and p.dim() > 2


def _linear_of(layer: Any) -> nn.Linear:
    """A linear layer in place of a ``Conv1D``, without weights yet."""
    with torch.device("meta"):
        return nn.Linear(*layer.weight.shape, bias=layer.bias is not None)


def make_saveable(model: Any) -> None:
    """Have ``save_pretrained`` write a model's 4-bit weights as bitsandbytes stores them, in
    place; nothing where bitsandbytes has no such format."""
    tensors = [p for p in model.parameters() if isinstance(p, NF4Tensor)]
    if not tensors or any(t.quant_type not in BNB_QUANT_TYPES for t in tensors):
        return
    held = {n.rpartition(".")[0] for n, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    make: Any = BitsAndBytesConfig  # registering it loses its arguments' types
    settings = make(
        bnb_4bit_quant_type=tensors[0].quant_type,
        bnb_4bit_use_double_quant=tensors[0].nested_absmax is not None,
        bnb_4bit_compute_dtype=model.config.dtype,
        llm_int8_skip_modules=sorted(linear - held) or None,
    )
    model.hf_quantizer = FourBitQuantizer(settings)
    model.config.quantization_config = settings
    model.is_loaded_in_4bit = model.is_quantized = True


if importlib.util.find_spec("bitsandbytes") is None:
    AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = BitsAndBytesConfig
