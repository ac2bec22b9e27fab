"""The student, its loss and its gradients against the released Feature-Distillation code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from tests import golden

SEED = 23


class StatedTeacher(nn.Module):
    """A teacher that says the stated tokens whatever it sees."""

    embed_dim = 384

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def encode(self, images: Tensor) -> Tokens:
        return Tokens(self.tokens[:, :1], self.tokens[:, 1:], (14, 14))


@pytest.fixture(scope="module")
def student(shared: Path) -> Backbone:
    teacher = build_timm("vit_tiny_patch16_224", {})
    student = build_student(StudentConfig(drop_path=0), teacher, image_size=224, seed=0)
    state = golden.state_dict(shared / "golden/fd_student.npz", SEED, prefix="encoder.")
    network = student.network
    network.load_state_dict({key: value for key, value in state.items() if not key.endswith("_index")})
    return student


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, Tensor]:
    return golden.arrays(shared / "golden/fd_loss.npz")


def _teacher_tokens() -> Tensor:
    noise = np.random.RandomState(31).standard_normal((2, 197, 384))
    tokens = (noise * 3 + 1.5) * np.linspace(0.2, 6, 197)[None, :, None]
    return torch.from_numpy(tokens.astype(np.float32))


def _method(student: Backbone, **config: object) -> FeatureDistillation:
    teacher = StatedTeacher(_teacher_tokens())
    settings = FeatureDistillationConfig.model_validate(config)
    method = FeatureDistillation(teacher, student, RandomCrop(CropConfig()), settings)  # type: ignore[arg-type]
    with torch.no_grad():
        method.projector.weight.copy_(golden.weight("decoder.0.weight", (384, 192, 1), 29).squeeze(-1))
        method.projector.bias.copy_(golden.weight("decoder.0.bias", (384,), 29))
    method.zero_grad()
    return method.train()


def test_student_tokens_are_the_references(student: Backbone, shared: Path) -> None:
    expected = golden.arrays(shared / "golden/fd_student.npz")["tokens"]
    with torch.no_grad():
        tokens = student.eval()(golden.images()).all()
    assert tokens.shape == (2, 197, 192)
    torch.testing.assert_close(tokens[:, ::7], expected, rtol=0, atol=golden.TOLERANCE)


def test_loss_and_gradients_are_the_references(student: Backbone, expected: dict[str, Tensor]) -> None:
    method = _method(student)
    loss = method([golden.images()], 0.0)["loss"]
    loss.backward()
    network = student.network
    found = {
        "loss": loss.detach(),
        "grad_table": network.rel_pos_bias.relative_position_bias_table.grad,  # type: ignore[union-attr]
        "gnorm_dec": method.projector.weight.grad.norm(),  # type: ignore[union-attr]
        "gnorm_patch": network.patch_embed.proj.weight.grad.norm(),  # type: ignore[union-attr, operator]
    }
    for name, value in found.items():
        reference = expected[name].reshape(value.shape).to(value.dtype)  # type: ignore[union-attr]
        torch.testing.assert_close(
            value, reference, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "wrong", [{"beta": 1.0}, {"whitening": "none"}, {"whitening": "l2"}, {"whitening": "batch"}]
)
def test_wrong_settings_miss_the_reference(
    wrong: dict[str, object], student: Backbone, expected: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        loss = _method(student, **wrong)([golden.images()], 0.0)["loss"]
    assert abs(loss - expected["loss"].float()) > 10 * golden.TOLERANCE


def test_patch_tokens_alone_miss_the_reference(
    student: Backbone, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a class token in the loss, what the class token attends to gets a far smaller gradient."""
    tokens_of = student.tokens_of
    empty = torch.zeros(2, 0, 192)
    monkeypatch.setattr(student, "tokens_of", lambda *args: tokens_of(*args)._replace(prefix=empty))
    _method(student)([golden.images()], 0.0)["loss"].backward()
    table = student.network.rel_pos_bias.relative_position_bias_table  # type: ignore[union-attr]
    reference = expected["grad_table"][729].norm()
    assert (table.grad[729] - expected["grad_table"][729]).norm() > 0.1 * reference  # type: ignore[index, union-attr, operator]
