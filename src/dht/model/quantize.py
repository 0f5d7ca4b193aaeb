"""int8 weights for inference on a CPU: a quarter of the blocks' memory, and integer matrix products.

Weights are rounded once, per output channel and symmetrically. Activations are rounded at every call, per token, so
that a row's result does not depend on the rest of its batch. Sums are exact (int32); norms, attention, embeddings and
exit heads stay in float32.

Shape letters: S tokens, K inputs and C outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DHTError
from .block import Block

if TYPE_CHECKING:
    from ..hf.modeling import DHTForSequenceClassification

INPUT_AXIS = {"qkv_weight": (-1,), "up_weight": (-1,), "out_weight": (0, 1), "down_weight": (0, 1)}
"""The axes of a block's weights that a product sums over; the others are output channels and have a scale each."""


class Int8Weight:
    """A weight as int8 values times scales, which takes the weight's place wherever a block slices and multiplies it.

    Args:
        values: int8, the weight's shape.
        scale: float32, the same number of axes; 1 along those that a product sums over.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor, inputs: tuple[int, ...]) -> Int8Weight:
        """`weight` rounded to 255 levels per output channel; `inputs` are the axes that a product sums over."""
        scale = weight.detach().float().abs().amax(inputs, keepdim=True).clamp_min(1e-12) / 127
        return cls((weight.detach().float() / scale).round().to(torch.int8), scale)

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.values.shape

    requires_grad = False

    @property
    def dtype(self) -> torch.dtype:
        """int8."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    @property
    def _version(self) -> int:
        return self.values._version

    def is_inference(self) -> bool:
        """As of a tensor."""
        return self.values.is_inference()

    def to(self, _: torch.dtype) -> Int8Weight:
        """Itself: autocast changes what it is multiplied with, not its values."""
        return self

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.values.data_ptr()

    def index_select(self, axis: int, index: Tensor) -> Int8Weight:
        """The chosen head units."""
        scale = self.scale if self.scale.shape[axis] == 1 else self.scale.index_select(axis, index)
        return Int8Weight(self.values.index_select(axis, index), scale)

    def flatten(self, start: int = 0, end: int = -1) -> Int8Weight:
        """As of a tensor."""
        return Int8Weight(self.values.flatten(start, end), self.scale.flatten(start, end))

    def t(self) -> Int8Weight:
        """The transpose of a matrix."""
        return Int8Weight(self.values.t(), self.scale.t())

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            hidden, weight, bias = args
            return _product(hidden, weight.values.t(), weight.scale.t()) + bias
        return NotImplemented


def _product(hidden: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """[S, C], `hidden` [S, K] @ (`values` [K, C] * `scale` [1, C]) with every row of `hidden` rounded to int8."""
    step = hidden.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (hidden / step).round().to(torch.int8)
    product: Tensor = torch._int_mm(rounded, values) * step * scale
    return product.to(hidden.dtype)


def quantize(model: DHTForSequenceClassification) -> DHTForSequenceClassification:
    """Returns `model` itself with the blocks' weights in int8, ready for inference on a CPU.

    The policy is untouched: it decides from the exits of the rounded model. A saved model stays in float: quantise
    after loading, which takes milliseconds.

    Raises:
        DHTError: the model is not on a CPU, is compiled or carries adapters; later, on an attempt to save the quantised
            model.
    """
    if model.device.type != "cpu":
        raise DHTError(f"quantize: the model is on {model.device}, allowed: cpu; call model.cpu() first")
    if not all(isinstance(block, Block) for block in model.encoder.blocks):
        raise DHTError("quantize: the blocks carry adapters; merge them first: model.merge_and_unload()")
    if any(block._compiled for block in model.encoder.blocks):
        raise DHTError("quantize: the model is compiled; quantise a copy.deepcopy of it, which is not")
    model.eval().requires_grad_(False)
    for block in model.encoder.blocks:
        for name, inputs in INPUT_AXIS.items():
            weight = Int8Weight.of(getattr(block, name), inputs)
            delattr(block, name)
            object.__setattr__(block, name, weight)
    object.__setattr__(model, "save_pretrained", _refuse)
    return model


def _refuse(*_: object, **__: object) -> NoReturn:
    raise DHTError("quantize: a quantised model is not saved; save the float model and quantise it after loading")
