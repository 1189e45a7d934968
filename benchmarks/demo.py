"""Train a small CNN on real data, export it raw, optimize the file with the command line, and compare.

    python benchmarks/demo.py

The data are the 1,797 handwritten digits (8x8) that come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

FOLDER = Path(".demo")
SEED = 0
EPOCHS = 12


def block(inputs: int, outputs: int, **conv: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **conv), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def network() -> nn.Module:
    return nn.Sequential(
        block(1, 32),
        block(32, 64, stride=2),
        block(64, 64, groups=64),
        block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def predict(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(logits)


def main() -> None:
    torch.manual_seed(SEED)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    digits = load_digits()
    images = digits.images[:, None].astype(np.float32) / 16
    x_train, x_test, y_train, y_test = train_test_split(images, digits.target, test_size=0.25, random_state=SEED)

    print(f"training a small CNN on {len(x_train)} handwritten digits ...")
    started = time.perf_counter()
    model = network()
    train(model, torch.from_numpy(x_train), torch.from_numpy(y_train))
    print(f"trained for {EPOCHS} epochs in {time.perf_counter() - started:.1f} s\n")

    FOLDER.mkdir(exist_ok=True)
    before, after = FOLDER / "digits.onnx", FOLDER / "digits.fused.onnx"
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        (torch.from_numpy(x_test[:2]),),
        dynamo=True,
        optimize=False,  # raw: BatchNorm is still there
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    program.save(before)

    command = [sys.executable, "-m", "fuser", "optimize", str(before), str(after), "--verbose"]
    print("$ fuser", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True)

    logits = {path: predict(path, x_test) for path in (before, after)}
    accuracy = {path: float((scores.argmax(1) == y_test).mean()) for path, scores in logits.items()}
    nodes = {path: [node.op_type for node in onnx.load(path).graph.node] for path in (before, after)}
    worst = float(np.abs(logits[before] - logits[after]).max())
    print(f"\non {len(x_test)} unseen digits     before    after")
    print(f"accuracy               {accuracy[before]:9.2%}{accuracy[after]:9.2%}")
    print(f"nodes                  {len(nodes[before]):9}{len(nodes[after]):9}")
    for kind in ("BatchNormalization", "Expand", "CastLike"):
        print(f"  {kind:21}{nodes[before].count(kind):9}{nodes[after].count(kind):9}")
    print(f"largest difference between the logits: {worst:.1e} (logits reach {np.abs(logits[before]).max():.0f})")
    if accuracy[before] != accuracy[after] or "BatchNormalization" in nodes[after]:
        sys.exit("the demo expected every BatchNorm folded and the same accuracy")


if __name__ == "__main__":
    main()
