"""`DHTConfig`: the encoder's sizes and the policy's settings, as a `transformers` configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .._labels import EMBEDDING, REGRESSION, SINGLE, TOKEN
from ..errors import ConfigError, shown

FORMAT_VERSION = 4
"""Of saved models; a larger number in a file means that a newer dht wrote it."""

_WHOLE = {
    "vocab_size": (1, 2**31), "hidden_size": (1, 2**20), "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**12), "intermediate_size": (1, 2**20), "max_position_embeddings": (1, 2**31),
    "type_vocab_size": (0, 2**20), "position_offset": (0, 2**20), "relative_attention_num_buckets": (0, 2**16),
    "context_projection": (0, 2**16), "head_sets": (1, 2**16), "policy_seed": (0, 2**63), "format_version": (0, 2**31),
    "wide_from": (0, 2**12), "lexical_pairs": (0, 2**24), "lexical_filters": (0, 2**12),
}  # fmt: skip
"""Whole numbers and what is allowed, ends included."""

_REAL = {
    "hidden_dropout_prob": (0.0, 1.0), "attention_probs_dropout_prob": (0.0, 1.0), "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e6), "ridge": (0.0, 1e300), "forgetting": (0.0, 1.0), "alpha": (0.0, 1e300),
    "sigma": (0.0, 1e300), "unit_weight": (0.0, 1e300), "exploration": (0.0, 1.0), "budget": (0.0, 1.0),
    "distillation": (0.0, 1.0), "exit_memory": (0.0, 1.0),
    "label_mean": (-1e300, 1e300), "label_std": (0.0, 1e300),
}  # fmt: skip
"""Real numbers, likewise; a few must be above the lower end, which `check` looks at."""


@strict
class DHTConfig(PreTrainedConfig):
    """Sizes of the encoder and settings of the policy.

    Args:
        norm: "post" (BERT), "pre" (the from-scratch preset) or "modern" (ModernBERT: before each part, with the
            embeddings' norm in place of the first, and exits that pool normalised tokens).
        attention_bias, ffn_bias, norm_bias: False where the family has no biases there.
        gated_ffn: True for activation(up x) * (gate x) in the FFN.
        embedding_size: width of the embedding tables where it is not `hidden_size` (ELECTRA).
        rotary_thetas: base of the rotary positions of each layer; None = learned positions.
        windows: tokens to either side that a token attends to, of each layer; None = all.
        pooling: what the exit heads read: "attention" (tokens weighed by learned queries that start at the mean),
            "mean" over tokens, or "cls" (first token).
        last_pooling: the same for the last exit, which may come with the checkpoint; None = `pooling`.
        last_activation, last_bias, last_norm: the last exit's activation, whether its dense layer has a bias, and
            whether a norm follows the activation; the other exits have tanh, a bias and no norm.
        position_offset: index of the first position embedding (MPNet, RoBERTa: 2).
        relative_attention_num_buckets: buckets of the shared relative position bias; 0 = none.
        source: the family that the weights came from, as `transformers` calls it ("bert", ...), or "dht".
        search: "tree" or "integrated".
        ffn: "coupled" (a head unit carries 1/H of the FFN) or "dense" (attention heads alone).
        widths: ascending numbers of head units to choose among; None = from the budget B: K = H sqrt(B), which leaves
            the same share of the depth, and all H (decision 4).
        wide_from: layers run before every layer offers only the widest of `widths`; None = two thirds of the depth,
            N = never (decisions 6 and 14).
        train_widths: "narrowest": where there is a choice, all rows run the narrowest width, in training and after it;
            "all": every row chooses its width (decisions 6 and 14).
        context_projection: random directions of the mean embedding that the first decision sees; None = 8 in
            integrated search and 0 in tree search, whose first decision gains nothing by them.
        ridge: lambda, the prior precision of every arm.
        forgetting: gamma in (0, 1], discount per observed decision.
        alpha: UCB optimism while training; inference is greedy.
        sigma: standard deviation of Thompson draws while training; inference uses posterior means.
        unit_weight: weight of a training row's gate gradients beside those of a calibration row (1). Low: a unit is
            worth what the weights around it have learned to make of it, and sets that move keep the weights from
            learning.
        exploration: share of training steps that run every layer and every unit: no layer starves, every unit is paid.
        head_sets: G, distinct head sets per layer and width that a batch may use.
        reward: "correct" or "probability", the quality of an exit.
        distillation: share of the loss of a row's earlier exits in which its last exit's answer is the label.
        exit_memory: when serving, an exit's logits are its own plus so much of those of the exit before it, if that was
            computed (decision 11), until training has fitted `exit_mixture`; 0 = its own alone.
        exit_mixture: what an answer is made of when serving, fitted to held-out rows (decision 18): for the exits after
            layers 1 to N, what the lexical exit's logits and those of exits 1 to N count; None = as `exit_memory` says.
        lexical_pairs: buckets that pairs of neighbouring tokens are hashed into, for an exit before layer 1 that reads
            tokens and pairs (decision 17); 0 = there is none. Single labels and tree search only.
        lexical_filters: of that exit's convolution over neighbouring tokens (decision 20); 0 = it has none.
        class_weights: what a row of each class counts in the loss; None = 1.
        problem_type: "single_label_classification" (None means it too), "multi_label_classification" or "regression"
            (None with one output); the task (`dht.task`).
        head: what the exits give: "classifier" (logits of classes, or a number), "embedding" (a vector, `dht.embed`) or
            "token" (logits of tags for every token; nothing is pooled, whatever `pooling` says).
        label_mean, label_std: of a regression's training labels; its loss and reward are in units of them.
        budget: the fraction of dense FLOPs that the model was trained for.
        policy_seed: seed of the policy's draws.
    """

    model_type = "dht"
    keys_to_ignore_at_inference = ["trace"]  # noqa: RUF012  (`Trainer` adds lists to it)

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    norm: str = "post"
    attention_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    gated_ffn: bool = False
    embedding_size: int | None = None
    rotary_thetas: list[float | int] | None = None
    windows: list[int | None] | None = None
    pooling: str = "attention"
    last_pooling: str | None = None
    last_activation: str = "tanh"
    last_bias: bool = True
    last_norm: bool = False
    position_offset: int = 0
    relative_attention_num_buckets: int = 0
    source: str = "dht"
    search: str = "tree"
    ffn: str = "coupled"
    widths: list[int] | None = None
    wide_from: int | None = None
    train_widths: str = "narrowest"
    context_projection: int | None = None
    ridge: float = 1.0
    forgetting: float = 0.9998
    alpha: float = 0.05
    sigma: float = 0.3
    unit_weight: float = 0.05
    exploration: float = 0.02
    head_sets: int = 1
    reward: str = "correct"
    head: str = "classifier"
    label_mean: float | int = 0.0
    label_std: float | int = 1.0
    distillation: float | int = 0.0
    exit_memory: float | int = 0.0
    exit_mixture: list[list[float | int]] | None = None
    lexical_pairs: int = 0
    lexical_filters: int = 0
    class_weights: list[float] | None = None
    budget: float = 1.0
    policy_seed: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.context_projection is None:
            self.context_projection = 8 if self.search == "integrated" else 0
        # Before `transformers` computes with them. What else makes no sense is left for `check` to tell.
        problems = self._wrong_types()
        if problems:
            raise ConfigError(problems)
        if self.widths is None:
            heads = self.num_attention_heads
            budget = min(max(self.budget, 0.0), 1.0)
            self.widths = sorted({max(1, round(heads * math.sqrt(budget))), heads})
        if self.wide_from is None:
            self.wide_from = math.ceil(2 * self.num_hidden_layers / 3)
        super().__post_init__(**kwargs)

    @property
    def mixture(self) -> list[list[float]] | None:
        """`exit_mixture`, or what `exit_memory` comes to; None where exits answer alone."""
        memory, layers = self.exit_memory, self.num_hidden_layers
        if self.exit_mixture is not None:
            return [[float(weight) for weight in row] for row in self.exit_mixture]
        powers = [
            [memory ** (exit_ - j) if j <= exit_ else 0.0 for j in range(layers + 1)] for exit_ in range(1, layers + 1)
        ]
        return powers if memory else None

    @property
    def label_names(self) -> dict[int, str]:
        """Class index -> its name; `id2label` with the integer keys that `transformers` always gives it."""
        return cast("dict[int, str]", self.id2label)

    def check(self) -> None:
        """Raises `ConfigError` with every problem of this configuration."""
        problems = self._wrong_types()
        if problems:
            raise ConfigError(problems)

        def need(ok: bool, what: str) -> None:
            if not ok:
                problems.append(what)

        heads = self.num_attention_heads
        if self.format_version > FORMAT_VERSION:
            problems.append(
                f"format_version: the checkpoint has {self.format_version}, this dht reads up to {FORMAT_VERSION};"
                " install a newer dht"
            )
        need(heads >= 1, f"num_attention_heads: got {heads}, must be at least 1")
        need(self.num_hidden_layers >= 1, f"num_hidden_layers: got {self.num_hidden_layers}, must be at least 1")
        pad, words = self.pad_token_id, self.vocab_size
        need(pad is None or 0 <= pad < words, f"pad_token_id: got {pad}, must be in 0..{words - 1} or null")
        if heads >= 1:
            for name in ("hidden_size", "intermediate_size"):
                size = getattr(self, name)
                need(size % heads == 0, f"{name}: {size} is not a multiple of num_attention_heads = {heads}")
            widths = self.widths or []
            fits = bool(widths) and widths == sorted(set(widths)) and widths[0] >= 1 and widths[-1] <= heads
            need(fits, f"widths: got {self.widths}, must be ascending numbers in 1..{heads}")
            size = self.hidden_size // heads
            even = not self.rotary_thetas or size % 2 == 0
            need(even, f"rotary_thetas: heads of {size} dimensions cannot be turned in pairs; their size must be even")
        layers, mixture = self.num_hidden_layers, self.exit_mixture
        fits = mixture is None or (len(mixture) == layers and {len(row) for row in mixture} == {layers + 1})
        need(fits, f"exit_mixture: must have {layers} rows of {layers + 1} numbers, one a layer")
        for name, lowest in (("rotary_thetas", 1), ("windows", 0)):
            values = getattr(self, name)
            fits = values is None or len(values) == self.num_hidden_layers
            fits = fits and all(value is None or value >= lowest for value in values or ())
            need(fits, f"{name}: got {values}, must be {self.num_hidden_layers} numbers (one a layer) from {lowest} on")
        size = self.embedding_size
        need(size is None or size >= 1, f"embedding_size: got {size}, must be at least 1")
        for name in ("hidden_act", "last_activation"):
            got = getattr(self, name)
            need(got in ACT2FN, f"{name}: transformers has no activation {got!r}")
        for name, allowed in {
            "norm": ("post", "pre", "modern"),
            "pooling": ("attention", "mean", "cls"),
            "last_pooling": (None, "attention", "mean", "cls"),
            "train_widths": ("narrowest", "all"),
            "search": ("tree", "integrated"),
            "ffn": ("coupled", "dense"),
            "reward": ("correct", "probability"),
            "head": ("classifier", "embedding", "token"),
        }.items():
            got = getattr(self, name)
            need(got in allowed, f"{name}: got {got!r}, allowed: {', '.join(map(str, allowed))}")
        for name, low, high in (
            ("forgetting", 0.0, 1.0),
            ("budget", 0.0, 1.0),
        ):
            got = getattr(self, name)
            need(low < got <= high, f"{name}: got {got}, must be in ({low:g}, {high:g}]")
        deepest, wide_from = self.num_hidden_layers, cast("int", self.wide_from)
        need(0 <= wide_from <= deepest, f"wide_from: got {wide_from}, must be in 0..{deepest}")
        need(0.0 <= self.exploration <= 1.0, f"exploration: got {self.exploration}, must be in [0, 1]")
        need(self.ridge > 0, f"ridge: got {self.ridge}, must be above 0")
        for name in ("alpha", "sigma", "unit_weight", "context_projection"):
            need(getattr(self, name) >= 0, f"{name}: got {getattr(self, name)}, must be at least 0")
        weights, classes = self.class_weights, len(self.label_names)
        right = weights is None or (len(weights) == classes and all(0 <= w < math.inf for w in weights))
        need(right, f"class_weights: got {weights}, must be {classes} finite numbers of at least 0, one a class")
        need(self.head_sets >= 1, f"head_sets: got {self.head_sets}, must be at least 1")
        problems += self._wrong_for_task()
        told = {problem.split(":")[0] for problem in problems}
        for name, (least, most) in {**_WHOLE, **_REAL}.items():
            got = getattr(self, name)
            if name not in told:
                need(least <= got <= most, f"{name}: got {got}, must be in {least:g}..{most:g}")
        if problems:
            raise ConfigError(problems)

    def _wrong_for_task(self) -> list[str]:
        """What does not go with the task: a setting that would be ignored is wrong too."""
        problem, outputs, mean, std = self.problem_type, len(self.label_names), self.label_mean, self.label_std
        own = next((task for head, task in (("embedding", EMBEDDING), ("token", TOKEN)) if self.head == head), None)
        if own:
            task = own
        else:
            task = problem or (REGRESSION if outputs == 1 else SINGLE)
        numeric, plain = task == REGRESSION, task in (REGRESSION, EMBEDDING)
        found = (
            (task == EMBEDDING and problem is not None, f"problem_type: got {problem!r}, an embedding has none"),
            (task == TOKEN and problem is not None, f"problem_type: got {problem!r}, a tagger has none"),
            (task == TOKEN and outputs < 2, f"num_labels: got {outputs}, a tagger needs 2 tags or more"),
            (numeric and outputs != 1, f"problem_type: {task!r} has one output, got {outputs}"),
            (
                task != SINGLE and self.class_weights is not None,
                f"class_weights: got {self.class_weights}, but the task {task!r} takes none",
            ),
            (
                plain and self.reward != "correct",
                f"reward: got {self.reward!r}, but the task {task!r} takes only 'correct'",
            ),
            (
                task == TOKEN and (self.distillation > 0 or self.exit_memory > 0),
                "distillation, exit_memory: for answers of whole rows, not for tags",
            ),
            (
                self.lexical_pairs > 0 and (task != SINGLE or self.search != "tree"),
                f"lexical_pairs: got {self.lexical_pairs}; allowed: 0 but for single labels and search='tree'",
            ),
            (
                self.lexical_filters > 0 and not self.lexical_pairs,
                f"lexical_filters: got {self.lexical_filters}; allowed: 0 where lexical_pairs is 0",
            ),
            (std <= 0, f"label_std: got {std}, must be above 0"),
            (
                not numeric and (mean, std) != (0, 1),
                f"label_mean, label_std: got {mean:g}, {std:g}, only for a regression",
            ),
        )
        return [what for wrong, what in found if wrong]

    def _wrong_types(self) -> list[str]:
        kinds: tuple[tuple[Iterable[str], Callable[[Any], bool], str], ...] = (
            (_WHOLE, _is_whole, "a whole number"),
            (_REAL, _is_real, "a number"),
            (("pad_token_id", "embedding_size"), lambda got: got is None or _is_whole(got), "a whole number or null"),
            (("hidden_act", "last_activation"), lambda got: isinstance(got, str), "a name"),
            (("widths",), lambda got: isinstance(got, list) and all(map(_is_whole, got)), "whole numbers"),
            (
                ("class_weights",),
                lambda got: got is None or (isinstance(got, list) and all(map(_is_real, got))),
                "null, or a number for every class",
            ),
            (
                ("exit_mixture",),
                lambda got: (
                    got is None
                    or (isinstance(got, list) and all(isinstance(row, list) and all(map(_is_real, row)) for row in got))
                ),
                "null, or a list of numbers for every layer",
            ),
            (
                ("rotary_thetas", "windows"),
                lambda got: got is None or (isinstance(got, list) and all(x is None or _is_real(x) for x in got)),
                "null, or a number or null for every layer",
            ),
        )
        problems = []
        for names, fits, allowed in kinds:
            for name in names:
                got = getattr(self, name)
                derived = got is None and name in ("widths", "wide_from")
                if not (derived or fits(got)):
                    problems.append(f"{name}: got {shown(got)}, allowed: {allowed}")
        return problems


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**63


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
