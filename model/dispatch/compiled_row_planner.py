"""Plans rows as model/dispatch/row_plan.py does, in C (row_plan.h): the same numbers in a tenth of the time.

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
from model.kernels.packed_cpu_library import KernelLibrary
from model.kernels.packed_rows import BAD_ID

_ID_BYTES = 2


class CompiledRowPlanner:
    """See RowPlanner."""

    def __init__(self, routing: LayerRouting, library: KernelLibrary) -> None:
        self.routing = routing
        self._row_plan, self._row_plan_offsets = library.short.row_plan, library.short.row_plan_offsets
        self._copies = None if routing.copies is None else _CompiledCopies(routing.copies, library)
        self._holder_of_X, self._slot_of_X = map(np.ascontiguousarray, (routing.holder_of_X, routing.slot_of_X))
        self._struct = library.new_struct(
            "Routing", copies=None if self._copies is None else ctypes.addressof(self._copies.struct),
            holder_of=self._holder_of_X.ctypes.data, slot_of=self._slot_of_X.ctypes.data, rank=routing.rank,
            num_members=routing.num_members, num_experts=routing.padding_id, num_slots=routing.num_slots)
        self.address = ctypes.addressof(self._struct)
        self._at = library.new_struct("RowPlanOffsets")         # of plans of this shape
        self._shape: tuple[int, int, int] | None = None

    def plan(self, expert_ids_SK: IdArray, owner_S: IntArray, own: slice) -> RowPlan:
        num_rows, num_per_row = expert_ids_SK.shape
        step_bytes, id_bytes = expert_ids_SK.strides
        if id_bytes != _ID_BYTES:
            expert_ids_SK = np.ascontiguousarray(expert_ids_SK)
            step_bytes = expert_ids_SK.strides[0]
        assert expert_ids_SK.dtype == np.int16 and owner_S.dtype == np.int64 and owner_S.flags.c_contiguous
        num_own = own.stop - own.start
        if (num_rows, num_per_row, num_own) != self._shape:
            self._shape = num_rows, num_per_row, num_own
            self._row_plan_offsets(self.address, *self._shape, ctypes.addressof(self._at))
        numbers = np.empty(self._at.end, dtype=np.int64)
        status = self._row_plan(self.address, _address(expert_ids_SK), step_bytes // _ID_BYTES, num_rows, num_per_row,
                                _address(owner_S), own.start, num_own, _address(numbers))
        if status == BAD_ID:
            raise foreign_ids(self.routing)
        if status:
            raise OutOfMemoryError("no memory to plan the rows of a layer", fix="lower max_batch_tokens")
        return self._read(numbers, num_own, num_per_row)

    def _read(self, numbers: IntArray, num_own: int, num_per_row: int) -> RowPlan:
        """Return what C wrote into one array, taken apart."""
        at, num_members = self._at, self.routing.num_members
        counts: list[int] = numbers[:at.end_of_counts].tolist()
        num_rows_E = counts[at.num_slot_rows:at.num_slot_rows + self.routing.num_slots]
        departures_M, returns_M, sent_M, received_M = (
            counts[first:first + num_members]
            for first in (at.num_departures, at.num_returns, at.num_sent, at.num_received))
        source_row, departure, place, row_of, sent_row = at.source_row, at.departure, at.place, at.row_of, at.sent_row
        num_arrived = sum(num_rows_E)
        return RowPlan(
            Arrivals(num_rows_E, numbers[source_row:source_row + num_arrived],
                     numbers[departure:departure + num_arrived], departures_M),
            Returns(numbers[row_of:row_of + num_own * num_per_row].reshape(num_own, num_per_row), returns_M),
            numbers[sent_row:sent_row + sum(sent_M)], sent_M, numbers[place:place + num_arrived], received_M)


def foreign_ids(routing: LayerRouting) -> ValueError:
    return ValueError(f"an expert id that none of the layer's {routing.padding_id} experts has: the members do not run "
                      "the same model")


def _address(array: npt.NDArray[np.generic]) -> int:
    """Return where the array lies, much sooner than array.ctypes.data."""
    address: int = array.__array_interface__["data"][0]
    return address


class _CompiledCopies:
    """Holds LayerCopies as the struct that C reads, and the arrays that it points to."""

    def __init__(self, copies: LayerCopies, library: KernelLibrary) -> None:
        first_holder = np.cumsum([0, *map(len, copies.holders_C)], dtype=np.int64)
        holders = np.array([rank for ranks in copies.holders_C for rank in ranks], dtype=np.int64)
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "fixed": copies.fixed_F, "holder": copies.holder_F, "read_F": copies.read_F, "row_F": copies.row_F,
            "start_F": copies.start_F, "copied": copies.copied_C, "first_holder": first_holder, "holders": holders,
            "short_up_to": np.array(copies.short_up_to_C), "splits_from": np.array(copies.splits_from_C),
            "read": copies.read_M, "row": copies.row_M, "start": copies.start_M}
        self._arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.struct = library.new_struct(
            "Copies", num_members=copies.num_members, num_experts=copies.num_experts, num_fixed=len(copies.fixed_F),
            num_copied=len(copies.copied_C), **{name: array.ctypes.data for name, array in self._arrays.items()})
