"""Each of several engines has GPUs of its own, among those that the process may see."""

from __future__ import annotations

import pytest

from pipeline.config import EngineConfig, VllmConfig
from pipeline.engines.vllm_devices import own_gpus, refuse_other_device, visible_gpus
from pipeline.errors import EngineError


def shares(
    visible: list[str], device: str = "auto", data_parallel: int = 1, tensor_parallel: int = 1
) -> list[list[str]]:
    """What each engine gets."""
    vllm = VllmConfig(data_parallel=data_parallel, tensor_parallel=tensor_parallel)
    config = EngineConfig(kind="vllm", device=device, vllm=vllm)
    return [own_gpus(visible, config, i) for i in range(data_parallel)]


@pytest.mark.parametrize(
    ("visible", "settings", "expected"),
    [
        (["0", "1"], {}, [["0"]]),
        (["0", "1"], {"data_parallel": 2}, [["0"], ["1"]]),
        (["0", "1"], {"device": "cuda:0", "data_parallel": 2}, [["0"], ["1"]]),
        (["4", "5"], {"device": "cuda:1"}, [["5"]]),
        (["4", "5"], {"device": "cuda", "tensor_parallel": 2}, [["4", "5"]]),
        (["2", "3", "6", "7"], {"data_parallel": 2, "tensor_parallel": 2}, [["2", "3"], ["6", "7"]]),
        (["0", "1", "2"], {"device": "cuda:1", "data_parallel": 2}, [["1"], ["2"]]),
        (["GPU-8a2b", "GPU-c0d1"], {"data_parallel": 2}, [["GPU-8a2b"], ["GPU-c0d1"]]),
    ],
)
def test_engines_share_the_visible_gpus_from_the_named_one_on(
    visible: list[str], settings: dict[str, object], expected: list[list[str]]
) -> None:
    assert shares(visible, **settings) == expected


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"data_parallel": 3}, "data_parallel = 3 times tensor_parallel = 1 needs 3 GPUs.* there are 2"),
        ({"data_parallel": 2, "tensor_parallel": 2}, "needs 4 GPUs.* there are 2"),
        ({"device": "cuda:1", "data_parallel": 2}, "engine.device = cuda:1 there are 1"),
        ({"device": "cuda:2"}, "there are 0"),
    ],
)
def test_more_engines_than_gpus_are_one_line(settings: dict[str, object], line: str) -> None:
    with pytest.raises(EngineError, match=line) as error:
        shares(["4", "5"], **settings)
    assert "\n" not in str(error.value)


def test_a_device_that_the_installed_vllm_is_not_built_for_is_one_line() -> None:
    with pytest.raises(
        EngineError, match=r"engine\.device = cpu, and .* built for GPUs.*\"transformers\"\.$"
    ):
        refuse_other_device("cpu", cpu=False)
    with pytest.raises(EngineError, match=r"engine\.device = cuda:1, and .* built for CPUs\. Set it to auto"):
        refuse_other_device("cuda:1", cpu=True)
    for device, cpu in (("auto", True), ("cpu", True), ("auto", False), ("cuda:1", False)):
        refuse_other_device(device, cpu)


def test_visible_gpus_are_those_of_the_environment_as_far_as_cuda_knows_them() -> None:
    assert visible_gpus(None, 3) == ["0", "1", "2"]
    assert visible_gpus("4, 5", 2) == ["4", "5"]
    assert visible_gpus("0,1,99", 2) == ["0", "1"]
    assert visible_gpus("", 0) == []
