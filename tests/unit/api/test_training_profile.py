"""What a profile says of its GPU's memory, and requirements on nodes that no scheduler could read."""

import pytest
from pydantic import ValidationError

from diffusion_api.training_profile import NodeRequirement, ProfileSpec


@pytest.mark.parametrize(
    ("spec", "memory", "is_slice"),
    [
        ({"resourceName": "nvidia.com/gpu", "memoryGiB": 80}, 80, False),
        ({"resourceName": "nvidia.com/gpu"}, None, False),
        ({"resourceName": "nvidia.com/mig-3g.40gb"}, 40, True),
        ({"resourceName": "nvidia.com/mig-1g.5gb.me"}, 5, True),
        ({"resourceName": "nvidia.com/mig-2g.20gb", "memoryGiB": 19.5}, 19.5, True),
        (
            {
                "resourceName": "nvidia.com/gpu",
                "nodeAffinity": [
                    {
                        "key": "nvidia.com/gpu.product",
                        "values": ["NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"],
                    }
                ],
            },
            20,
            True,
        ),
        (
            {
                "resourceName": "nvidia.com/gpu",
                "nodeAffinity": [
                    {"key": "nvidia.com/gpu.product", "operator": "NotIn", "values": ["A100-MIG-3g.40gb"]}
                ],
            },
            None,
            False,
        ),
        ({"device": "CPU"}, None, False),
    ],
)
def test_memory_is_what_it_says_or_what_the_smallest_slice_does(spec, memory, is_slice):
    profile = ProfileSpec.model_validate(spec)
    assert (profile.gpu_memory_gib, profile.is_slice) == (memory, is_slice)


@pytest.mark.parametrize(
    "content",
    [
        {"key": "a"},
        {"key": "a", "operator": "NotIn"},
        {"key": "a", "operator": "Gt", "values": []},
        {"key": "a", "operator": "Gt", "values": ["40Gi"]},
        {"key": "a", "operator": "Lt", "values": ["1", "2"]},
        {"key": "a", "operator": "Exists", "values": ["x"]},
    ],
)
def test_values_that_do_not_suit_the_operator_are_refused(content):
    with pytest.raises(ValidationError, match="requirement on a: In and NotIn need values"):
        NodeRequirement.model_validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {"key": "a", "values": ["x", "y"]},
        {"key": "a", "operator": "Gt", "values": ["40000"]},
        {"key": "a", "operator": "Lt", "values": ["-1"]},
        {"key": "a", "operator": "DoesNotExist"},
    ],
)
def test_those_that_do_are_not(content):
    assert NodeRequirement.model_validate(content).key == "a"
