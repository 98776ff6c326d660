import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.modeling import LossSettings
from earlyexit_ssd.modeling.training import Branches, FullPath, compute_taps
from tests.modeling.conftest import small_model


def test_branches_from_taps_have_the_whole_model_s_losses_and_gradients(images, targets):
    results = []
    for cached in (False, True):
        model = small_model()
        model.losses = LossSettings(teacher="full")
        model.router = ExitRouter(2, learn_temperatures=True)
        model.freeze_trunk()
        model.train()
        losses = Branches(model)(compute_taps(model, images, targets)) if cached else model(images, targets)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (cached_losses, cached_gradients) = results
    assert losses.keys() == cached_losses.keys()
    assert all(torch.equal(losses[key], cached_losses[key]) for key in losses)
    assert gradients.keys() == cached_gradients.keys()
    assert all(torch.equal(gradients[key], cached_gradients[key]) for key in gradients)


def test_full_path_trains_no_branch(model, images, targets):
    module = FullPath(model.train())
    losses = module(images, targets)
    assert sorted(losses) == ["bbox_regression", "classification"]
    names = [name for name, _ in module.named_parameters()]
    assert all(name.startswith(("backbone.", "head.")) for name in names)
    assert len(names) == sum(1 for name, _ in model.named_parameters() if not name.startswith("branches."))
