"""Train the bundled sample: a byte-level DIFF Transformer on the source of Python's standard library.

Run from the project root: ``python scripts/train_sample.py``. Writes ``diffdeploy/checkpoints/sample/``.
The text is what ``sysconfig`` calls the standard library, without tests and installed packages; every twentieth file,
in the order of the sha256 digests, is held out.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.config import DecoderConfig, RopeConfig
from diffdeploy.modules.decoder import DiffTransformer

# Small enough to train on a CPU and to ship in the package, but with grouped heads and several layers.
CONTEXT = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
STEPS_PER_LINE = 100
ROPE = RopeConfig(style="interleaved", theta=10000.0)
SIZES: dict[str, Any] = {
    # One token for each byte.
    "vocab_size": 256,
    "embed_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    # 8/3 of the model width, as in the paper, rounded to a multiple of 8.
    "ffn_dim": 344,
    "norm_eps": 1e-5,
}
CONFIG = DecoderConfig.of_paper(**SIZES, rope=ROPE)


def read_text() -> tuple[bytes, bytes]:
    """Read the training and the held-out bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [p.read_bytes() for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    # Ordered by content, so that the split does not depend on the location of the library.
    files.sort(key=lambda text: hashlib.sha256(text).digest())
    return b"".join(f for i, f in enumerate(files) if i % 20), b"".join(files[::20])


def order0_entropy(text: bytes) -> float:
    """Bits per byte of the best code for single bytes."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    probabilities = counts[counts > 0] / len(text)
    return float(-(probabilities * np.log2(probabilities)).sum())


def as_tokens(text: bytes) -> Tensor:
    """Convert text to tokens ``[len(text)]``, int64."""
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))


def bits_per_byte(model: DiffTransformer, windows: Tensor) -> Tensor:
    """Mean loss over ``[B, CONTEXT + 1]`` tokens."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    # From 1 at the end of the warm-up to 0.1.
    return PEAK_LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(model: DiffTransformer, tokens: Tensor, steps: int) -> float:
    """Run the optimiser and return the mean loss of the last hundredth of the steps, in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        # One more token than the context, since each is predicted from the previous ones.
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH_SIZE, 1))
        loss = bits_per_byte(model, tokens[starts + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % STEPS_PER_LINE == 0:
            recent = sum(losses[-STEPS_PER_LINE:]) / STEPS_PER_LINE
            print(
                f"step {step + 1}/{steps}  {recent:.3f} bits per byte  {time.monotonic() - started:.0f} s", flush=True
            )
    tail = losses[-max(1, steps // 100) :]
    return sum(tail) / len(tail)


@torch.inference_mode()
def evaluate(model: DiffTransformer, tokens: Tensor) -> float:
    """Bits per byte over all whole windows of ``tokens``."""
    # Without overlap, so that each byte counts once.
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    losses = [bits_per_byte(model, chunk).item() * len(chunk) for chunk in torch.split(windows, 64)]
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("diffdeploy/checkpoints/sample"))
    arguments = parser.parse_args()

    training_text, held_out_text = read_text()
    # Seeds both the initial weights and the batches.
    torch.manual_seed(arguments.seed)
    model = DiffTransformer(CONFIG, max_positions=CONTEXT)
    train_loss = train(model, as_tokens(training_text), arguments.steps)
    record = {
        "data": "source of Python's standard library, without tests",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train_bytes": len(training_text),
        "train_sha256": hashlib.sha256(training_text).hexdigest(),
        "held_out_bytes": len(held_out_text),
        "held_out_sha256": hashlib.sha256(held_out_text).hexdigest(),
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "context": CONTEXT,
        "seed": arguments.seed,
        "train_bits_per_byte": round(train_loss, 4),
        "held_out_bits_per_byte": round(evaluate(model, as_tokens(held_out_text)), 4),
        "held_out_order0_entropy_bits_per_byte": round(order0_entropy(held_out_text), 4),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.output / "model.safetensors")
    config = {
        "model_type": "diffdeploy",
        **SIZES,
        "rope": {"style": ROPE.style, "theta": ROPE.theta},
        "gqa_layout": "canonical",
        "training": record,
    }
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
