"""What is wanted from the data, and what the model expects of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.data.structure import Tree
from swa_avg.errors import UnreadableError, UsageError

__all__ = [
    "ARGUMENTS",
    "TARGET",
    "TRAINING",
    "VALIDATION",
    "WEIGHT",
    "Batch",
    "Purpose",
    "Shape",
    "Spec",
    "fits",
]

Batch = Any
"""What the model's call takes: an array, or where there are several inputs, a mapping from their names to
arrays."""
Shape = tuple[int | None, ...]

TARGET = "/"
"""What the name of a target starts with, beside those of inputs: Keras lets no input be called so."""
WEIGHT = "//"
"""What the name of a target's sample weights starts with; the rest is empty where they are those of all."""
_BATCH_SIZE = 128


@dataclass(frozen=True)
class Purpose:
    """What data are for."""

    option: str
    """How the options that describe them start; empty where arguments in Python do."""
    keys: tuple[str, ...]
    """What their inputs are usually called."""
    targets: tuple[str, ...] = ()
    """What their targets are usually called; none where targets are not wanted."""
    shuffled: bool = True
    """Whether rows come in a seeded random order, or in their own."""


TRAINING = Purpose("--bn", ("x", "x_train", "images"))
ARGUMENTS = Purpose("", TRAINING.keys)
"""Training data that were handed over in Python."""
VALIDATION = Purpose(
    "--val", ("x", "x_val", "x_test", "images"), ("y", "y_val", "y_test", "labels"), shuffled=False
)


class Spec:
    """What the caller wants from the data, and what the model expects."""

    def __init__(
        self,
        *,
        bind: Sequence[str] = (),
        input_names: Sequence[str] = (),
        input_shapes: Sequence[Shape | None] = (),
        batch_size: int | None = None,
        samples: int | None = None,
        seed: int = 0,
        preprocess: Callable[[Batch], Batch] | None = None,
        purpose: Purpose = TRAINING,
        bind_targets: Sequence[str] = (),
        output_names: Sequence[str] = (),
        structure: Tree | None = None,
        optional: Collection[str] = (),
        text: Collection[str] | None = (),
    ) -> None:
        """Take what is known; errors name the options of `purpose`.

        Args:
            bind: `KEY` or `KEY=NAME`, and likewise `bind_targets`.
            input_names: Of the model's inputs; none where they are not known.
            input_shapes: As Keras gives them, batch dimension first.
            batch_size: Rows a batch, where the data do not come in batches.
            samples: Rows to use.
            seed: Of the order of rows.
            preprocess: Applied to each batch.
            purpose: What the data are for.
            bind_targets: As `bind`.
            output_names: Of the model's outputs, where there are several.
            structure: Of the model's inputs, with names as leaves; None where it is not known.
            optional: Inputs that may be left out.
            text: Inputs that take strings; None where that is not known.

        Raises:
            UsageError: a number is too small, or a name is none of the model's.
        """
        if samples is not None and samples < 1:
            raise UsageError(f"the number of samples must be at least 1, not {samples}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        if seed < 0:
            raise UsageError(f"the seed must be at least 0, not {seed}")
        self.names = list(input_names)
        self.structure = structure
        self.optional = optional
        self.text = text
        self.shapes = list(input_shapes) or [None] * max(1, len(self.names))
        fixed = next((shape[0] for shape in self.shapes if shape and shape[0]), None)
        if fixed and batch_size and fixed != batch_size:
            raise UsageError(f"the model takes batches of {fixed} only, not of {batch_size}")
        self.whole_batches = fixed is not None
        self.batch_size = fixed or batch_size or _BATCH_SIZE
        self.samples = samples
        self.seed = seed
        self.preprocess = preprocess
        self.purpose = purpose
        self.outputs = list(output_names)
        self.bound = self._parse(bind, self.names, "input")
        self.bound_targets = self._parse(bind_targets, self.outputs, "target")

    def _parse(self, bind: Sequence[str], names: Sequence[str], what: str) -> dict[str, str]:
        """Return input or output -> key from `KEY[=NAME]`."""
        bound: dict[str, str] = {}
        for entry in bind:
            key, _, name = entry.rpartition("=") if "=" in entry else (entry, "", "")
            if not name:
                name = names[0] if len(names) == 1 else key if key in names else ""
                if not name and all(other.isdigit() for other in names):  # positions, which have no names
                    name = next((other for other in names if other not in bound), "")
            if not key or (names and name not in names) or name in bound:
                expected = ", ".join(f"{key or 'KEY'}={name}" for name in names) or "KEY=INPUT for each input"
                side = {"input": "input", "target": "output"}[what]
                option = f"{self.purpose.option}-{what}" if self.purpose.option else f"{what}s:"
                raise UsageError(
                    f"{option} {entry} names no {side} of the model, or one twice; use {expected}"
                )
            bound[name] = key
        return bound

    def choose(self, source: str, arrays: Mapping[str, object]) -> dict[str, str]:
        """Return input of the model ("" where it has no names), and target, -> key.

        Raises:
            UnreadableError: a key is unknown, or it is not clear which to take; all keys are listed.
        """
        targets = self.choose_targets(source, arrays) if self.purpose.targets else {}
        return {**self.choose_inputs(source, arrays, set(targets.values())), **targets}

    def choose_inputs(
        self, source: str, arrays: Mapping[str, object], taken: Collection[str] = ()
    ) -> dict[str, str]:
        """Return input -> key, if need be of those that are not `taken`; errors as for `choose`."""
        names = self.names or list(self.bound) or [""]
        return self._choose(source, arrays, names, self.bound, self.purpose.keys, "input", taken)

    def choose_targets(self, source: str, arrays: Mapping[str, object]) -> dict[str, str]:
        """Return target, an output's name after TARGET, -> key; errors as for `choose`."""
        names = self.outputs or list(self.bound_targets) or [""]
        chosen = self._choose(
            source, arrays, names, self.bound_targets, self.purpose.targets, "target", list(arrays)
        )
        return {TARGET + name: key for name, key in chosen.items()}

    def _choose(
        self,
        source: str,
        arrays: Mapping[str, object],
        names: Sequence[str],
        bound: Mapping[str, str],
        usual: Sequence[str],
        what: str,
        taken: Collection[str],
    ) -> dict[str, str]:
        """Choose as bound, by name, by what is usual, and else what alone is left of those not `taken`."""
        chosen = dict(bound)
        for name in names:
            if name not in chosen and name in arrays:
                chosen[name] = name
        if len(names) == 1 and names[0] not in chosen:
            found = [key for key in usual if key in arrays] or [key for key in arrays if key not in taken]
            if len(found) == 1 or (found and found[0] in usual):
                chosen[names[0]] = found[0]
        missing = [name for name in names if name not in chosen and name not in self.optional]
        unknown = [key for key in chosen.values() if key not in arrays]
        if missing or unknown:
            expected = unknown[0] if unknown else " and ".join(missing) or f"one array for the model's {what}"
            shown = ", ".join(map(str, arrays.values())) or "no numeric array"
            side = {"input": "INPUT", "target": "OUTPUT"}[what]
            hint = self.hint(f"choose with {{}}-{what} KEY" + (f"={side}" if len(names) > 1 else ""))
            raise UnreadableError(source, f"expected {expected or 'one array'}; found {shown}", hint=hint)
        return {name: chosen[name] for name in names if name in chosen}

    def hint(self, text: str) -> str:
        """Return what to do by options, with how they start in the place of `{}`; nothing in Python."""
        return text.format(self.purpose.option) if self.purpose.option else ""

    def takes_text(self, name: str) -> bool:
        """Tell whether an input, or what makes it of the data, may take strings."""
        return self.text is None or name in self.text or self.preprocess is not None or name[:1] == TARGET

    def shape_of(self, name: str) -> Shape | None:
        if name.startswith(TARGET):
            return None  # the model's loss knows, and says so
        return self.shapes[self.names.index(name)] if name in self.names else self.shapes[0]


def fits(shape: tuple[int, ...], expected: Shape) -> bool:
    """Tell whether Keras takes such an array: one last axis of 1 may be missing or too many, as in `fit`."""
    if len(shape) == len(expected) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    elif len(shape) == len(expected) - 1 and expected[-1] == 1:
        shape = (*shape, 1)
    return len(shape) == len(expected) and all(
        size is None or size == found for size, found in zip(expected[1:], shape[1:], strict=True)
    )
