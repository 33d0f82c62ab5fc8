"""The same small problem through a plain loop, Hugging Face accelerate and PyTorch Lightning: the same weights."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam_repro.optim.dropin.optimizers import GSAM, SAM

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def optimizer(build, model):
    return build(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.2, model=model)


def weights(model) -> torch.Tensor:
    return torch.cat([t.detach().float().reshape(-1) for t in model.state_dict().values()])


def plain(build) -> torch.Tensor:
    """Two epochs with first_step and second_step, a schedule, and clipping of both gradients."""
    model = network()
    opt = optimizer(build, model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 4, gamma=0.5)
    torch.manual_seed(0)
    for _ in range(2):
        for x, y in loader():
            for step in (opt.first_step, opt.second_step):
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                step()
            schedule.step()
    return weights(model)


def accelerated(build) -> torch.Tensor:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    opt = optimizer(build, model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 4, gamma=0.5)
    model, opt, data, schedule = accelerator.prepare(model, opt, loader(), schedule)
    torch.manual_seed(0)
    for _ in range(2):
        for x, y in data:

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                return loss

            opt.step(closure)
            schedule.step()
    return weights(accelerator.unwrap_model(model))


def lightning_module(build):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            opt = optimizer(build, self.net)
            schedule = torch.optim.lr_scheduler.StepLR(opt, 4, gamma=0.5)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return lightning, Module()


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def lightened(build, **kwargs) -> torch.Tensor:
    pytest.importorskip("lightning")
    lightning, module = lightning_module(build)
    trainer = lightning.Trainer(max_epochs=2, gradient_clip_val=0.5, enable_checkpointing=False, **QUIET, **kwargs)
    torch.manual_seed(0)
    trainer.fit(module, loader())
    return weights(module.net)


@pytest.mark.parametrize("build", [SAM, GSAM])
@pytest.mark.parametrize("framework", [accelerated, lightened])
def test_frameworks_equal_the_plain_loop(framework, build):
    torch.testing.assert_close(framework(build), plain(build), rtol=1e-5, atol=1e-6)


def manually_lightened(form):
    """Lightning's manual optimization, whose self.optimizers() hands out a proxy of the optimizer."""

    def train(build) -> torch.Tensor:
        pytest.importorskip("lightning")
        lightning, module = lightning_module(build)

        def training_step(batch, index=0):
            opt, schedule = module.optimizers(), module.lr_schedulers()

            def backward():
                opt.zero_grad()
                module.manual_backward(F.cross_entropy(module.net(batch[0]), batch[1]))
                module.clip_gradients(opt, 0.5, "norm")

            form(opt, backward)
            schedule.step()

        module.automatic_optimization, module.training_step = False, training_step
        trainer = lightning.Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
        torch.manual_seed(0)
        trainer.fit(module, loader())
        assert trainer.global_step == 8  # a step of two passes counts once
        return weights(module.net)

    return train


def fabricated(form):
    def train(build) -> torch.Tensor:
        lightning = pytest.importorskip("lightning")
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        net = network()
        model, opt = fabric.setup(net, optimizer(build, net))
        schedule = torch.optim.lr_scheduler.StepLR(opt, 4, gamma=0.5)
        torch.manual_seed(0)
        for _ in range(2):
            for x, y in fabric.setup_dataloaders(loader(), move_to_device=False):

                def backward(x=x, y=y):
                    opt.zero_grad()
                    fabric.backward(F.cross_entropy(model(x), y))
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)

                form(opt, backward)
                schedule.step()
        return weights(net)

    return train


def two_calls(opt, backward):
    backward()
    opt.first_step()
    backward()
    opt.second_step()


def block(opt, backward):
    backward()
    with opt.robust_pass():
        backward()
    opt.step()


@pytest.mark.parametrize("build", [SAM, GSAM])
@pytest.mark.parametrize("form", [two_calls, block])
@pytest.mark.parametrize("framework", [manually_lightened, fabricated])
def test_proxies_of_an_optimizer_equal_the_plain_loop(framework, form, build):
    torch.testing.assert_close(framework(form)(build), plain(build), rtol=1e-5, atol=1e-6)


def test_an_accelerated_optimizer_steps_in_two_calls_and_is_pickled():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    model, opt = accelerator.prepare(net, optimizer(GSAM, net))
    expected = network()
    alone = optimizer(GSAM, expected)
    x, y = next(iter(loader()))
    for _ in range(2):
        for each, own in ((model, opt.optimizer), (expected, alone)):
            torch.manual_seed(1)
            two_calls(own, lambda each=each, own=own: (own.zero_grad(), F.cross_entropy(each(x), y).backward()))
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    torch.testing.assert_close(weights(accelerator.unwrap_model(model)), weights(expected), rtol=1e-6, atol=1e-7)


def test_lightning_resumes_with_the_moments_of_the_base_optimizer(tmp_path):
    pytest.importorskip("lightning")

    def fit(epochs, **kwargs):
        lightning, module = lightning_module(SAM)
        module.net[3].p = 0.0  # Lightning does not save the generator
        trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
        trainer.fit(module, loader(), **kwargs)
        return trainer, weights(module.net)

    _, straight = fit(2)
    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    _, resumed = fit(2, ckpt_path=tmp_path / "epoch.ckpt", weights_only=False)
    assert torch.equal(resumed, straight)


def test_lightning_accumulation_is_refused_in_one_sentence():
    pytest.importorskip("lightning")
    with pytest.raises(ValueError, match="accumulate inside the closure"):
        lightened(SAM, accumulate_grad_batches=2)
