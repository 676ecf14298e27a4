"""The cases of regfast.proof where there is a GPU; no proof is written."""

import pytest
import torch

import regfast
from regfast.proof.prove import worker_command
from regfast.proof.run import run_cases

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and regfast.build_info()["cuda"]), reason="no GPU, or a build without CUDA kernels"
)


def test_every_case_on_the_gpu():
    _, subjects = run_cases([*worker_command(), "cases"], lambda *_: None)
    assert {name: subject.why_not for name, subject in subjects.items() if subject.why_not} == {}
