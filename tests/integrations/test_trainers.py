"""Our classes give the weights of torch's classes in other people's trainers, each used in its public way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dracopt_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01},
}
NATIVE = {"cpu": frozenset({"native"})}
every_class = pytest.mark.parametrize("name", OPTIONS)

Train = Callable[[Any, dict[str, Any]], tuple[nn.Module, Any]]
"""Trains with an optimizer class and its options; returns the model, and the optimizer that its trainer holds."""


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator)
    return x, x[:, :4].sin().sum(1, keepdim=True)


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=16)


def within_rounding(ours: nn.Module, theirs: nn.Module) -> bool:
    """Allows some tens of steps, of which each rounds a few times, by 6e-8 of numbers around one or less."""
    return all(
        torch.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def assert_trains_as_with_torchs(name: str, train: Train) -> None:
    model, optimizer = train(getattr(dracopt_ext, name), OPTIONS[name])
    assert innermost(optimizer).last_backend == NATIVE
    theirs, _ = train(getattr(torch.optim, name), OPTIONS[name])
    assert within_rounding(model, theirs)
    # The comparison must see a learning rate that is 1% off, and weights that have not been trained.
    off, _ = train(getattr(torch.optim, name), {**OPTIONS[name], "lr": OPTIONS[name]["lr"] * 1.01})
    assert not within_rounding(off, theirs)
    untrained, _ = train(getattr(torch.optim, name), {**OPTIONS[name], "lr": 0.0})
    assert not within_rounding(untrained, theirs)


def innermost(optimizer: Any) -> Any:
    while not hasattr(optimizer, "last_backend"):
        optimizer = optimizer.optimizer
    return optimizer


@every_class
@pytest.mark.parametrize("clip", [None, 0.5])
def test_lightning(name: str, clip: float | None, tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, make: Any, options: dict[str, Any]) -> None:
            super().__init__()
            self.network, self.make, self.options = network(), make, options

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters(), **self.options)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}

    def train(make: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        module = Module(make, options)
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=clip,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader())
        return module.network, trainer.optimizers[0]

    assert_trains_as_with_torchs(name, train)


@every_class
def test_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig())
            self.network = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            found = self.network(x)
            return {"loss": nn.functional.mse_loss(found, labels), "logits": found}

    x, y = data()
    examples = [{"x": x[i], "labels": y[i]} for i in range(len(x))]

    def train(make: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        model = Model()
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                num_train_epochs=4,
                per_device_train_batch_size=16,
                learning_rate=options["lr"],
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                seed=3,
            ),
            train_dataset=examples,
            optimizer_cls_and_kwargs=(make, options),
        )
        trainer.train()
        return model.network, trainer.optimizer

    assert_trains_as_with_torchs(name, train)


@every_class
def test_accelerate(name: str, tmp_path: Path) -> None:
    """Training accumulates gradients and loads a checkpoint from its middle."""
    import accelerate

    def train(make: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        model, optimizer, batches = accelerator.prepare(model, make(model.parameters(), **options), loader())
        for epoch in range(8):
            for inputs, targets in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 3:
                accelerator.save_state(str(tmp_path))
                accelerator.load_state(str(tmp_path))
        return accelerator.unwrap_model(model), optimizer

    assert_trains_as_with_torchs(name, train)


@every_class
def test_skorch(name: str) -> None:
    import skorch

    x, y = (tensor.numpy().astype(np.float32) for tensor in data())

    def train(make: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        regressor = skorch.NeuralNetRegressor(
            network(),
            optimizer=make,
            max_epochs=4,
            batch_size=16,
            train_split=None,
            verbose=0,
            **{f"optimizer__{key}": value for key, value in options.items()},
        )
        regressor.fit(x, y)
        return regressor.module_, regressor.optimizer_

    assert_trains_as_with_torchs(name, train)


@every_class
@pytest.mark.parametrize("wrapper", ["Lookahead", "SAM", "ScheduleFreeWrapper"])
def test_pytorch_optimizer(name: str, wrapper: str) -> None:
    """The wrappers in pytorch_optimizer train with our classes."""
    import pytorch_optimizer

    def train(make: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        model = network()
        if wrapper == "SAM":
            optimizer = pytorch_optimizer.SAM(model.parameters(), make, **options)
        elif wrapper == "Lookahead":
            optimizer = pytorch_optimizer.Lookahead(make(model.parameters(), **options), k=3)
        else:
            optimizer = pytorch_optimizer.ScheduleFreeWrapper(make(model.parameters(), **options))
            optimizer.train()
        for _ in range(4):
            for inputs, targets in loader():

                def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                    optimizer.zero_grad()
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    loss.backward()
                    return loss

                closure()
                optimizer.step(closure)
        return model, getattr(optimizer, "base_optimizer", optimizer)

    assert_trains_as_with_torchs(name, train)
