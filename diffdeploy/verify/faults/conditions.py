"""What must hold of a bundle for a fault to be one: heads that can be confused, a mask that can be ignored, ..."""

from diffdeploy.verify.faults.base import Subject

__all__ = [
    "cached",
    "causal",
    "causal_without_window",
    "float32",
    "grouped",
    "has_rope",
    "longer_than_64",
    "masked",
    "several_heads",
    "several_kv_heads",
    "several_pairs",
    "version_1",
    "window_above_64",
    "without_window",
]


def version_1(subject: Subject) -> bool:
    """The block is the paper's, with two key streams per head, one lambda and a norm."""
    return not subject.config.streams_share_keys


def several_heads(subject: Subject) -> bool:
    """Heads can be confused."""
    return subject.config.num_heads > 1


def several_kv_heads(subject: Subject) -> bool:
    """Key/value heads can be confused."""
    return subject.config.num_kv_heads > 1


def grouped(subject: Subject) -> bool:
    """Several heads read one key/value head."""
    return subject.config.num_heads > subject.config.num_kv_heads


def has_rope(subject: Subject) -> bool:
    """There is rotary embedding."""
    return subject.config.rope is not None


def several_pairs(subject: Subject) -> bool:
    """A stream has more than one pair of channels to turn."""
    return subject.config.head_dim > 2


def causal(subject: Subject) -> bool:
    """Positions see none after them."""
    return subject.config.causal


def without_window(subject: Subject) -> bool:
    """There is no sliding window."""
    return subject.config.sliding_window is None


def causal_without_window(subject: Subject) -> bool:
    """The mask is the plain causal one."""
    return causal(subject) and without_window(subject)


def window_above_64(subject: Subject) -> bool:
    """A window of 64 would be another one."""
    window = subject.config.sliding_window
    return window is None or window > 64


def longer_than_64(subject: Subject) -> bool:
    """Sequences can be longer than 64."""
    return subject.spec.axes["sequence_length"].max > 64


def masked(subject: Subject) -> bool:
    """The graph takes an attention mask."""
    return subject.spec.variant != "plain"


def cached(subject: Subject) -> bool:
    """The graph takes and gives a cache."""
    return subject.spec.variant == "cached"


def float32(subject: Subject) -> bool:
    """Half precision would be another one."""
    return subject.spec.dtype == "float32"
