"""`ChainRunner`: serves what `dht export --format onnx-chain` wrote, with onnxruntime and numpy and without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from ._extras import optional
from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .data import Text

runtime = optional("onnxruntime", "onnx", "dht.onnx")

__all__ = ["CHAIN_FILE", "CHAIN_VERSION", "POLICY_FILE", "ChainResult", "ChainRunner"]

CHAIN_FILE, POLICY_FILE, CHAIN_VERSION = "chain.json", "policy.safetensors", 4
EXIT_FEATURES = 8


@dataclass
class ChainResult:
    """What was answered and what it took.

    Attributes:
        logits: float32 [B, C], of the exit where each row left.
        heads: int64 [B, N], head units run in each layer; 0 = the row had left.
    """

    logits: NDArray[Any]
    heads: NDArray[Any]

    @property
    def layers(self) -> NDArray[Any]:
        """int64 [B], layers run by each row."""
        ran: NDArray[Any] = (self.heads > 0).sum(-1)
        return ran


class ChainRunner:
    """A dynamic classifier as a chain of graphs: rows that leave are not run any further.

    Args:
        folder: what `dht export --format onnx-chain` wrote.
        budget: fraction of dense FLOPs to serve; None = the one trained for.
        threads: of onnxruntime; None = its own choice.

    Raises:
        CheckpointError: a file is missing, broken, or of a newer dht.
        ConfigError: the budget is outside (0, 1].
    """

    def __init__(self, folder: str | Path, budget: float | None = None, threads: int | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / CHAIN_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["version"] > CHAIN_VERSION:
                raise CheckpointError(f"{path}: version {facts['version']}, this dht reads up to {CHAIN_VERSION}")
            self.search, self.widths, self.inputs = facts["search"], facts["widths"], facts["inputs"]
            self.label_names, self.max_length = facts["label_names"], facts["max_length"]
            self.pad_token_id, names = facts["pad_token_id"], facts["layers"]
            trained_for, memory, depth = float(facts["budget"]), float(facts.get("exit_memory", 0.0)), len(names)
            self.mixture = facts.get("exit_mixture") or [
                [memory ** (exit_ - j) if j <= exit_ else 0.0 for j in range(depth + 1)]
                for exit_ in range(1, depth + 1)
            ]
            self.lexical_pairs, self.pair_factors = (
                int(facts.get("lexical_pairs", 0)),
                facts.get("pair_factors", [0, 0]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path}: cannot be read ({error}); give a folder of dht export --format onnx-chain"
            ) from None
        self._options = runtime.SessionOptions()
        if threads:
            self._options.intra_op_num_threads = threads
        try:
            self._policy: dict[str, NDArray[Any]] = load_file(self.folder / POLICY_FILE)
            self._embed = self._session("embeddings.onnx")
            self._layers = [[self._session(name) if name else None for name in widths] for widths in names]
        except Exception as error:  # onnxruntime and safetensors: many classes
            raise CheckpointError(f"{self.folder}: cannot load the chain ({error}); export it again") from None
        self._tokenizer: Any = None
        self.price = 0.0
        self.set_budget(trained_for if budget is None else budget)

    def set_budget(self, budget: float) -> None:
        """Moves the price to where the measured fraction of dense FLOPs is `budget`; beyond the curve, to its end.

        Raises:
            ConfigError: outside (0, 1].
        """
        if not 0.0 < budget <= 1.0:
            raise ConfigError(f"budget: got {budget}, allowed: a number in (0, 1]")
        order = np.argsort(self._policy["curve_price"], kind="stable")
        prices = self._policy["curve_price"][order]
        fractions = np.minimum.accumulate(self._policy["curve_fraction"][order])
        at = int(np.argmax(fractions <= budget)) if (fractions <= budget).any() else len(prices) - 1
        self.price = float(prices[at])
        if at and fractions[at] <= budget and fractions[at - 1] != fractions[at]:
            share = (fractions[at - 1] - budget) / (fractions[at - 1] - fractions[at])
            self.price = float(prices[at - 1] + share * (prices[at] - prices[at - 1]))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> ChainResult:
        """The answers to a padded batch.

        Args:
            inputs: `input_ids`, `attention_mask` (1 at real tokens) and, where the chain takes them, `token_type_ids`,
                int64 [B, T] each.

        Raises:
            ValueError: a row has no real token.
        """
        fed = {name: np.asarray(inputs[name], dtype=np.int64) for name in self.inputs}
        mask, depth = fed["attention_mask"], len(self._layers)
        if not mask.any(-1).all():
            raise ValueError(f"row {int(np.argmin(mask.any(-1)))} of the batch has no real token: its mask is all zero")
        (states,) = self._embed.run(None, fed)
        rows, arm = np.arange(len(mask)), np.zeros(len(mask), dtype=np.int64)
        answer = np.zeros((len(rows), len(self.label_names)), dtype=np.float32)
        logits = before = answer
        if self.lexical_pairs:
            logits = self._lexical(fed["input_ids"], mask)
            answer = logits.copy()
        own = [logits]  # of the exits so far; zeros for a lexical one that is not there
        heads = np.zeros((len(rows), depth), dtype=np.int64)
        for layer in range(depth):
            if self.search == "tree" or layer == 0:
                context = self._context(layer, states, mask, logits, before)
                arm = self._best(layer, context)
            width = self._widths(layer, arm)
            stay = width >= 0
            if not stay.any():
                break
            rows, arm, width, before = rows[stay], arm[stay], width[stay], logits[stay]
            own = [each[stay] for each in own]
            used = int(np.flatnonzero(mask[stay].any(0))[-1]) + 1
            states, mask = states[stay, :used], mask[stay, :used]
            after = np.empty_like(states)
            logits = np.empty((len(rows), answer.shape[1]), dtype=np.float32)
            for i in np.unique(width):
                group = width == i
                session = self._layers[layer][i]
                after[group], logits[group] = session.run(
                    None, {"states": states[group], "attention_mask": mask[group]}
                )
            states = after
            own.append(logits)
            weights = self.mixture[layer] if self.search == "tree" else [0.0] * (layer + 1) + [1.0]
            logits = np.stack([np.float32(w) * each for w, each in zip(weights, own, strict=False)]).sum(0)
            answer[rows], heads[rows, layer] = logits, np.take(self.widths, width)
        return ChainResult(answer, heads)

    def predict(self, texts: Iterable[Text], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """One dict a text, in order: `label`, `score` (its probability), `layers`, `heads` (units in each layer run).

        Args:
            texts: single ones or pairs; read lazily, a batch at a time.
        """
        held: list[Text] = []
        for text in texts:
            held.append(text)
            if len(held) == batch_size:
                yield from self._answers(held)
                held = []
        if held:
            yield from self._answers(held)

    def _answers(self, texts: list[Text]) -> Iterator[dict[str, Any]]:
        if self._tokenizer is None:
            tokenizers = optional("tokenizers", "onnx", "dht.onnx")
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self._tokenizer.enable_truncation(self.max_length)
            self._tokenizer.no_padding()
        made = self._tokenizer.encode_batch(texts)
        shape = (len(made), max(len(row.ids) for row in made))
        fed = {
            name: np.full(shape, self.pad_token_id if name == "input_ids" else 0, dtype=np.int64)
            for name in self.inputs
        }
        parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        for name, table in fed.items():
            for i, row in enumerate(made):
                table[i, : len(row.ids)] = getattr(row, parts[name])
        result = self.run(fed)
        probabilities = _softmax(result.logits.astype(np.float64))
        for i, widths in enumerate(result.heads):
            best = int(probabilities[i].argmax())
            yield {
                "label": self.label_names[best],
                "score": round(float(probabilities[i, best]), 6),
                "layers": int((widths > 0).sum()),
                "heads": widths[widths > 0].tolist(),
            }

    def _session(self, name: str) -> Any:
        return runtime.InferenceSession(
            str(self.folder / Path(name).name), self._options, providers=["CPUExecutionProvider"]
        )

    def _lexical(self, input_ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
        """float32 [B, C], logits of the exit before layer 1: as in `dht.model.lexical`."""
        weight, bias = self._policy["lexical_weight"], self._policy["lexical_bias"]
        vocabulary, keep = len(weight) - self.lexical_pairs, mask.astype(bool)
        first, second = self.pair_factors
        hashed = (input_ids[:, :-1] * first + input_ids[:, 1:] * second) % self.lexical_pairs + vocabulary
        seen = np.concatenate([input_ids, hashed], 1)
        real = np.concatenate([keep, keep[:, :-1] & keep[:, 1:]], 1)
        seen = np.sort(np.where(real, seen, len(weight)), 1)
        counts = seen < len(weight)
        counts[:, 1:] &= seen[:, 1:] != seen[:, :-1]
        share = counts / np.sqrt(counts.sum(1, keepdims=True))
        logits = (weight[np.minimum(seen, len(weight) - 1)] * share[..., None]).sum(1) + bias
        if "lexical_convolution.table" in self._policy:
            logits = logits + self._convolution(input_ids, keep)
        found: NDArray[Any] = logits.astype(np.float32)
        return found

    def _convolution(self, input_ids: NDArray[Any], keep: NDArray[Any]) -> NDArray[Any]:
        """float32 [B, C], logits of that exit's filters: as in `dht.model.convolution`."""
        table, bias, reader, base = (
            self._policy[f"lexical_convolution.{name}"] for name in ("table", "bias", "reader", "base")
        )
        shares = (table[input_ids] * keep[..., None]).reshape(*input_ids.shape, -1, len(bias))
        found = shares[:, :, 0] + bias
        for ahead in range(1, shares.shape[2]):
            found[:, : found.shape[1] - ahead] += shares[:, ahead:, ahead]
        found = np.maximum(found, 0) * keep[..., None]
        pooled = np.concatenate([found.max(1), found.sum(1) / keep.sum(1, keepdims=True)], 1)
        logits: NDArray[Any] = pooled @ reader + base
        return logits

    def _best(self, layer: int, context: NDArray[Any]) -> NDArray[Any]:
        """int64 [R], the arm of highest quality less price times cost; the price is that of a row of mean length."""
        mean = float(self._policy.get("mean_tokens", 0.0))
        price = self.price * (np.exp(context[:, 1:2] * math.log(512)) / mean if mean else 1.0)
        index = context @ self._policy[f"quality_{layer}"] - price * (context @ self._policy[f"cost_{layer}"])
        best: NDArray[Any] = index.argmax(-1)
        return best

    def _widths(self, layer: int, arm: NDArray[Any]) -> NDArray[Any]:
        """int64 [R], index of the width that each row runs in the next layer; -1 = it leaves."""
        if self.search == "tree":  # arms: stop (before layer 1 only with a lexical exit), then the widths
            return arm - (layer > 0 or self.lexical_pairs > 0)
        count = len(self.widths)  # arms: (layers, width), depth by depth
        widest = self._layers[layer][0] is None
        width = np.full_like(arm, count - 1) if widest else arm % count
        return np.where(arm // count + 1 > layer, width, -1)

    def _context(
        self, layer: int, states: NDArray[Any], mask: NDArray[Any], logits: NDArray[Any], before: NDArray[Any]
    ) -> NDArray[Any]:
        """float64 [R, F], what the decision before layer `layer` + 1 sees: as in `dht.policy.context`."""
        projection = self._policy["projection"]
        phi = np.zeros((len(mask), EXIT_FEATURES + len(projection)), dtype=np.float32)
        phi[:, 0] = 1.0
        phi[:, 1] = np.log(mask.sum(-1).astype(np.float32)) / math.log(512)
        if layer or self.lexical_pairs:
            probabilities = _softmax(logits)
            ordered = np.sort(probabilities, -1)
            sure, second = ordered[:, -1], ordered[:, -2]
            safe = np.where(probabilities > 0, probabilities, 1)
            entropy = -(probabilities * np.log(safe)).sum(-1) / math.log(probabilities.shape[-1])
            phi[:, 2:6] = np.stack([sure, sure**2, entropy, sure - second], -1)
            if layer > (0 if self.lexical_pairs else 1):
                phi[:, 6] = before.argmax(-1) == logits.argmax(-1)
                phi[:, 7] = _softmax(before).max(-1)
        elif len(projection):
            mean = (states * mask[..., None]).sum(1) / mask.sum(-1, keepdims=True)
            unit = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
            phi[:, EXIT_FEATURES:] = unit @ projection.T
        return phi.astype(np.float64)


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    shares: NDArray[Any] = raised / raised.sum(-1, keepdims=True)
    return shares
