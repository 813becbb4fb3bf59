"""Describes where the elements of tensors lie."""

from __future__ import annotations

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Says whether the elements lie side by side without gaps, in whatever order."""
    expected = 1
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in strides if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_expanded(tensor: Tensor) -> bool:
    """Says whether a tensor is expanded: several of its elements lie in one place."""
    repeats = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return repeats and tensor.numel() > 0


def may_overlap_itself(tensor: Tensor) -> bool:
    """Says whether several elements of a tensor that is not expanded might still lie in one place.

    They do not if each dimension strides over all that the faster dimensions reach.
    """
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def extent_of(tensor: Tensor) -> int:
    """Counts the elements from the beginning of a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def make_layout(streams: list[Tensor], count: int) -> list[int] | None:
    """Makes the words by which the kernel finds the elements of tensors of one shape; None if all of them lie alike.

    The elements are numbered in the first tensor's memory order, the last dimension running fastest. Dimensions that
    all streams traverse as one are merged. A complex number counts as two real ones. The words have strides for
    ``count`` streams; the strides of missing streams are zero.
    """
    strides = [tensor.stride() for tensor in streams]
    param = streams[0]
    if param.numel() == 0 or (all(s == strides[0] for s in strides) and is_dense(param)):
        return None
    if all(tensor.is_contiguous() for tensor in streams):
        return None
    sizes = list(param.shape)
    if param.is_complex():
        strides = [(*(2 * stride for stride in s), 1) for s in strides]
        sizes.append(2)
    order = sorted((d for d, size in enumerate(sizes) if size != 1), key=lambda d: -strides[0][d])
    dims: list[tuple[int, list[int]]] = []  # size, and strides by stream
    for d in order:
        of_d = [s[d] for s in strides]
        if dims and dims[-1][1] == [stride * sizes[d] for stride in of_d]:
            dims[-1] = dims[-1][0] * sizes[d], of_d
        else:
            dims.append((sizes[d], of_d))
    if not dims:
        dims = [(1, [1] * len(streams))]
    columns = [[of_d[k] for _, of_d in dims] for k in range(len(streams))]
    columns += [[0] * len(dims)] * (count - len(streams))
    return [len(dims), *(size for size, _ in dims), *(stride for column in columns for stride in column)]
