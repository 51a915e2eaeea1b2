"""Threads are shared only while several computations run."""

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

from diffdeploy.verify.threads import blas_threads_shared, half_the_threads


def blas_threads() -> set[int]:
    """Numbers of threads of the libraries of matrix products in this process, of which numpy has one."""
    assert np.eye(2) @ np.eye(2) is not None
    return {library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"}


def fail(blas: set[int], of_torch: int) -> None:
    with half_the_threads():
        assert blas_threads() == {max(1, count // 2) for count in blas}
        assert torch.get_num_threads() == max(1, of_torch // 2)
        raise KeyError


def test_threads_are_divided_and_given_back() -> None:
    with ThreadpoolController().limit(limits=8, user_api="blas"):
        before, of_torch = blas_threads(), torch.get_num_threads()
        with blas_threads_shared(3):
            assert blas_threads() == {max(1, count // 3) for count in before}
        assert blas_threads() == before
        with pytest.raises(KeyError):
            fail(before, of_torch)
        assert blas_threads() == before
        assert torch.get_num_threads() == of_torch


def test_one_computation_keeps_all_threads() -> None:
    with ThreadpoolController().limit(limits=4, user_api="blas"):
        before = blas_threads()
        with blas_threads_shared(1):
            assert blas_threads() == before
