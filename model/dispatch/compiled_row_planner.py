"""`plan_rows` of model/dispatch/row_plan.py in C (row_plan.h): the same numbers in a tenth of the time.

S rows of all members, K experts per row, M members, R (row, expert) pairs computed here
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from model.arrays import IdArray, IntArray
from model.dispatch.row_plan import Arrivals, LayerRouting, Returns, RowPlan
from model.dispatch.row_split import LayerCopies
from model.errors import OutOfMemoryError
from model.kernels.packed_cpu_library import CopiesStruct, KernelLibrary, RoutingStruct

_ID_BYTES = 2
_BAD_ID = 2


class CompiledRowPlanner:
    """See RowPlanner."""

    def __init__(self, routing: LayerRouting, library: KernelLibrary) -> None:
        self.routing = routing
        self._row_plan = library.short.row_plan
        self._copies = None if routing.copies is None else _CompiledCopies(routing.copies)
        self._holder_of_X, self._slot_of_X = map(np.ascontiguousarray, (routing.holder_of_X, routing.slot_of_X))
        self._struct = RoutingStruct(
            None if self._copies is None else ctypes.addressof(self._copies.struct), self._holder_of_X.ctypes.data,
            self._slot_of_X.ctypes.data, routing.rank, routing.num_members, routing.padding_id, routing.num_slots)
        self._address = ctypes.addressof(self._struct)

    def plan(self, expert_ids_SK: IdArray, owner_S: IntArray, own: slice) -> RowPlan:
        num_rows, num_per_row = expert_ids_SK.shape
        step_bytes, id_bytes = expert_ids_SK.strides
        if id_bytes != _ID_BYTES:
            expert_ids_SK = np.ascontiguousarray(expert_ids_SK)
            step_bytes = expert_ids_SK.strides[0]
        assert expert_ids_SK.dtype == np.int16 and owner_S.dtype == np.int64 and owner_S.flags.c_contiguous
        num_counts = self.routing.num_slots + 4 * self.routing.num_members
        num_pairs, num_own = num_rows * num_per_row, own.stop - own.start
        numbers = np.empty(num_counts + 3 * num_pairs + num_own * (num_per_row + self.routing.num_members),
                           dtype=np.int64)
        status = self._row_plan(self._address, _address(expert_ids_SK), step_bytes // _ID_BYTES, num_rows, num_per_row,
                                _address(owner_S), own.start, num_own, _address(numbers))
        if status == _BAD_ID:
            raise ValueError(f"expert ids {expert_ids_SK.min()}..{expert_ids_SK.max()} of a layer with "
                             f"{self.routing.padding_id} experts: the members do not run the same model")
        if status:
            raise OutOfMemoryError("no memory to plan the rows of a layer", fix="lower max_batch_tokens")
        return self._read(numbers, num_counts, num_pairs, num_own, num_per_row)

    def _read(self, numbers: IntArray, num_counts: int, num_pairs: int, num_own: int, num_per_row: int) -> RowPlan:
        """Apart what C wrote into one array, in the order of `RowPlanOut`."""
        counts: list[int] = numbers[:num_counts].tolist()
        num_rows_E = counts[:self.routing.num_slots]
        departures_M, returns_M, sent_M, received_M = (
            counts[first:first + self.routing.num_members]
            for first in range(self.routing.num_slots, num_counts, self.routing.num_members))
        num_arrived, place = sum(num_rows_E), num_counts + num_pairs
        departure, row_of = place + num_pairs, place + 2 * num_pairs
        token = row_of + num_own * num_per_row
        return RowPlan(
            Arrivals(num_rows_E, numbers[num_counts:num_counts + num_arrived],
                     numbers[departure:departure + num_arrived], departures_M),
            Returns(numbers[row_of:token].reshape(num_own, num_per_row), returns_M),
            numbers[token:token + sum(sent_M)], sent_M, numbers[place:place + num_arrived], received_M)


def _address(array: npt.NDArray[np.generic]) -> int:
    """Much sooner than array.ctypes.data."""
    address: int = array.__array_interface__["data"][0]
    return address


class _CompiledCopies:
    """LayerCopies as the struct that C reads, and the arrays that it points to."""

    def __init__(self, copies: LayerCopies) -> None:
        first_holder = np.cumsum([0, *map(len, copies.holders_C)], dtype=np.int64)
        holders = np.array([rank for ranks in copies.holders_C for rank in ranks], dtype=np.int64)
        self._arrays = [np.ascontiguousarray(array) for array in (
            copies.fixed_F, copies.holder_F, copies.read_F, copies.row_F, copies.start_F, copies.copied_C, first_holder,
            holders, np.array(copies.short_up_to_C), np.array(copies.splits_from_C), copies.read_M, copies.row_M,
            copies.start_M)]
        self.struct = CopiesStruct(*(array.ctypes.data for array in self._arrays), copies.num_members,
                                   copies.num_experts, len(copies.fixed_F), len(copies.copied_C))
