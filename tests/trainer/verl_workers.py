"""verl's trainer and its workers without a Ray cluster: its code of an actor update, in threads on a CPU.

What runs is verl's: `RayPPOTrainer._update_actor`, the cut into processes, `TrainingWorker.train_mini_batch`,
`FSDPEngineWithLMHead.forward_backward_batch` and `ppo_loss`. What does not: Ray, the wrapping by FSDP, the
optimizer's step, and torchdata and peft, which verl imports and these tests do not need.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
import verl
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

STANDINS = {
    "torchdata": ["torchdata", "torchdata.stateful_dataloader"],
    "peft": ["peft", "peft.utils", "peft.utils.save_and_load"],
}


def stand_in(name):
    """A module that has every name: mocks, and torch's `DataLoader` for torchdata's."""
    module = ModuleType(name)
    module.__path__, module.StatefulDataLoader = [], DataLoader
    module.__getattr__ = lambda attribute: MagicMock(name=f"{name}.{attribute}")
    return module


_missing = [package for package in STANDINS if importlib.util.find_spec(package) is None]
_standins = {name: stand_in(name) for package in _missing for name in STANDINS[package]}
sys.modules.update(_standins)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # engines that are not installed
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer, Role
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.engine_workers import TrainingWorker
for _name in _standins:  # nobody else is to find them
    del sys.modules[_name]

from verl.single_controller.base.decorator import _split_args_kwargs_data_proto  # noqa: E402
from verl.utils import seqlen_balancing, tensordict_utils  # noqa: E402
from verl.utils.metric import Metric  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

CONFIG = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"


def verl_config(**actor):
    """verl's own configuration of a training, with these values of `actor_rollout_ref.actor`."""
    config = OmegaConf.load(CONFIG)
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 1
    config.actor_rollout_ref.rollout.n = 1
    for name, value in actor.items():
        OmegaConf.update(config.actor_rollout_ref.actor, name, value)
    return config


class Processes:
    """`torch.distributed` between threads, of which each is a data-parallel process."""

    def __init__(self, number):
        self.number, self.barrier, self.values = number, Barrier(number, timeout=600), {}

    def gathered(self, rank, value):
        self.barrier.wait()  # all have read the last values
        self.values[rank] = value
        self.barrier.wait()
        return [self.values[each] for each in range(self.number)]

    def all_reduce(self, tensor, op, group):
        values = torch.stack([torch.as_tensor(value) for value in self.gathered(group, tensor.clone())])
        kinds = {"SUM": values.sum, "MAX": values.amax, "MIN": values.amin}
        tensor.copy_(kinds[str(op).rsplit(".", 1)[-1]](0))

    def all_gather_object(self, found, value, group):
        found[:] = self.gathered(group, value)

    @contextmanager
    def instead(self):
        fakes = {
            "all_reduce": self.all_reduce,
            "all_gather_object": self.all_gather_object,
            "get_world_size": lambda group=None: self.number,
            "is_initialized": lambda: True,
            "get_rank": lambda group=None: 0,  # torch's DataLoader asks, and does nothing with it here
        }
        with patch.multiple(torch.distributed, **fakes):
            yield


class Engine(transformer_impl.FSDPEngineWithLMHead):
    """verl's, of a model that is not split. Its data-parallel group is the rank, by which threads meet."""

    def __init__(self, model, rank, number):
        self.module, self.rank, self.number = model, rank, number
        self.engine_config = SimpleNamespace(
            use_no_sync_for_gradient_accumulation=False,
            entropy_checkpointing=False,
            entropy_from_logits_with_chunking=False,
        )
        self.ulysses_sequence_parallel_size, self.use_ulysses_sp, self.pad_to_length = 1, False, None
        self._autocast_dtype = torch.float32

    def get_data_parallel_rank(self):
        return self.rank

    def get_data_parallel_size(self):
        return self.number

    def get_data_parallel_group(self):
        return self.rank

    def is_mp_src_rank_with_outputs(self):
        return True

    @contextmanager
    def train_mode(self, **_):
        yield


class OneWorker(TrainingWorker):
    """verl's, which notes the loss and gradient of each optimizer step instead of taking it."""

    def __init__(self, engine, actor, tokens):
        self.engine, self.actor, self.tokens, self.steps = engine, actor, tokens, []
        self.profiler = SimpleNamespace(step=lambda: None)

    def train_batch(self, data):
        tensordict_utils.assign_non_tensor(
            data,
            use_remove_padding=False,
            use_fused_kernels=False,
            use_dynamic_bsz=self.tokens is not None,
            max_token_len_per_gpu=self.tokens,
            micro_batch_size_per_gpu=self.actor.ppo_micro_batch_size_per_gpu,
        )
        self.engine.module.zero_grad()
        output = self.engine.forward_backward_batch(data, partial(ppo_loss, self.actor))
        gradient = {name: weight.grad.clone() for name, weight in self.engine.module.named_parameters()}
        self.steps.append((sum(output["loss"]), gradient))
        # of the first process alone, where verl gathers a list over all
        metrics = {name: value if is_summed(value) else [value] for name, value in output["metrics"].items()}
        return tensordict_utils.get_tensordict({}, {"metrics": {**metrics, "mfu": 0.0}})


def is_summed(values):
    return isinstance(values, list) and isinstance(values[0], Metric)


class Workers:
    """A worker group: `steps` are the loss and gradient of each optimizer step, as FSDP averages them."""

    def __init__(self, model, config, number=1):
        actor = config.actor_rollout_ref.actor
        names = ["strategy", "ppo_micro_batch_size_per_gpu", "loss_agg_mode"]
        names += ["entropy_coeff", "use_kl_loss", "kl_loss_coef"]
        settings = {name: actor[name] for name in names}
        settings["policy_loss"] = {"loss_mode": actor.policy_loss.loss_mode}
        tokens = actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None
        self._dispatch_info = {"actor": list(range(number))}
        self.workers = [
            OneWorker(
                Engine(copy.deepcopy(model), rank, number), ActorConfig(rollout_n=1, **settings), tokens
            )
            for rank in range(number)
        ]

    def update_actor(self, batch):
        (shares,), _ = _split_args_kwargs_data_proto(len(self.workers), batch)
        shares = [pickle.loads(pickle.dumps(share)) for share in shares]  # as through Ray's store
        results, errors = [None] * len(shares), []

        def work(rank):
            try:
                results[rank] = self.workers[rank].train_mini_batch(shares[rank])
            except Exception as error:
                errors.append(error)
                processes.barrier.abort()

        processes = Processes(len(shares))
        name = {"get_device_name": lambda: "cpu"}  # verl's needs a GPU for its name
        on_cpu = patch.multiple(transformer_impl, get_device_id=lambda: "cpu", **name)
        with processes.instead(), on_cpu, patch.multiple(seqlen_balancing, **name):
            threads = [Thread(target=work, args=(rank,)) for rank in range(len(shares))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return results[0]

    @property
    def steps(self):
        """[(loss, {name: gradient})], the mean over processes."""
        number = len(self.workers)
        merged = []
        for each in zip(*(worker.steps for worker in self.workers), strict=True):
            names = each[0][1]
            gradient = {name: sum(found[name] for _, found in each) / number for name in names}
            merged.append((sum(loss for loss, _ in each) / number, gradient))
        return merged


def trainer_of(kind, config, tokenizer, workers):
    """A `RayPPOTrainer`, or what stands before it, whose worker group is `workers`."""
    config.data.train_batch_size = config.data.val_batch_size = 1
    config.data.dataloader_num_workers = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # verl prefers its V1 trainers
        trainer = kind(
            config=config,
            tokenizer=tokenizer,
            role_worker_mapping={Role.ActorRollout: None},
            resource_pool_manager=None,
            train_dataset=[{}],
            val_dataset=[{}],
            collate_fn=list,
            train_sampler=[0],
            device_name="cpu",
        )
    trainer.actor_rollout_wg = workers
    return trainer


__all__ = ["RayPPOTrainer", "Workers", "trainer_of", "verl_config"]
