"""Energy that a recursive filter leaves in consecutive pieces of a signal, by matrix products alone.

A filter runs sample by sample, which no array library does fast. But a block of its output is a part that the block
decides and a part that the few states in front of it decide, and that second part lies in a space of as many dimensions
as there are states. So all of a block's energy but that in these dimensions comes from one matrix product. What is left
of a block, its part in that space and what it adds to the states, is again the input of a linear system with as many
states, which is treated likewise, block of blocks by block of blocks, up to a piece. No output is ever formed, and no
large sums are subtracted from each other: what the filter takes out is gone with the first product.

Suffixes: S states, X inputs and Y outputs of one step, P pieces, C channels, N samples, K blocks, E directions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator

import numpy as np
import torch

# torch's matrix product takes 1.5 times as long for a number of columns that is no multiple of this.
COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class System:
    """One step of a linear system, float64: s becomes A s + B x, y = C s + D x."""

    a_SS: np.ndarray
    b_SX: np.ndarray
    c_YS: np.ndarray
    d_YX: np.ndarray


def cascade(sections: tuple[tuple[np.ndarray, np.ndarray], ...]) -> System:
    """Biquads (b, a) with a[0] = 1, one behind the other, as a system with two states each."""
    whole = System(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), np.ones((1, 1)))
    for b, a in sections:
        a_SS, b_SX = np.array([[-a[1], 1.0], [-a[2], 0.0]]), (b[1:] - a[1:] * b[0])[:, None]
        c_YS, d_YX = np.array([[1.0, 0.0]]), np.array([[b[0]]])
        behind = np.zeros((len(whole.a_SS), 2))
        whole = System(
            np.block([[whole.a_SS, behind], [b_SX @ whole.c_YS, a_SS]]),
            np.concatenate([whole.b_SX, b_SX @ whole.d_YX]),
            np.concatenate([d_YX @ whole.c_YS, c_YS], axis=1),
            d_YX @ whole.d_YX,
        )
    return whole


def gather(system: System, count: int) -> tuple[np.ndarray, System]:
    """``count`` steps of a system as one.

    Returns a matrix (inputs of all steps, E + 2 S), and the system whose steps take the last 2 S of its products as
    input. The energy of the outputs is that of the first E products plus that of the new system's outputs.
    """
    states, inputs = system.b_SX.shape
    outputs = []
    # What each state at the start and each input adds to the states.
    state = np.eye(states, states + count * inputs)
    for step in range(count):
        own = slice(states + step * inputs, states + (step + 1) * inputs)
        output = system.c_YS @ state
        output[:, own] += system.d_YX
        outputs.append(output)
        state = system.a_SS @ state
        state[:, own] += system.b_SX
    response = np.concatenate(outputs)
    # In these directions the states are as large as what they do to the outputs of the block.
    directions, scale = np.linalg.qr(response[:, :states], mode="complete")
    scale = scale[:states]
    driven = directions.T @ response[:, states:]
    spare = np.zeros((-(len(driven) + states) % COLUMNS, count * inputs))
    products = np.concatenate([driven[states:], spare, driven[:states], scale @ state[:, states:]])
    one, none = np.eye(states), np.zeros((states, states))
    decay = scale @ np.linalg.solve(scale.T, state[:, :states].T).T
    return products.T, System(decay, np.hstack([none, one]), one, np.hstack([one, none]))


class PieceEnergy:
    """A filter's energy in pieces of ``math.prod(counts)`` samples, so long that nothing of its states outlives one."""

    def __init__(self, sections: tuple[tuple[np.ndarray, np.ndarray], ...], counts: tuple[int, ...]) -> None:
        """counts   samples of a block, blocks of a block of blocks, and so on"""
        system, self.products = cascade(sections), []
        for count in counts:
            product, system = gather(system, count)
            self.products.append(torch.from_numpy(product.astype(np.float32)))
        self.counts, self.piece, self.states = counts, math.prod(counts), len(system.a_SS)

    def values(self, pieces: int, channels: int) -> int:
        """float32 values of ``scratch`` for so many pieces."""
        return sum(rows * columns for rows, columns in self._shapes(pieces * channels))

    def scratch(self, memory: np.ndarray, pieces: int, channels: int) -> list[torch.Tensor]:
        """``memory``, float32, as what ``__call__`` needs for so many pieces."""
        parts, begin = [], 0
        for rows, columns in self._shapes(pieces * channels):
            end = begin + rows * columns
            parts.append(torch.from_numpy(memory[begin:end].reshape(rows, columns)))
            begin = end
        return parts

    def _shapes(self, pieces: int) -> list[tuple[int, int]]:
        blocks = [self.piece * pieces // length for length in itertools.accumulate(self.counts, operator.mul)]
        return [(rows, product.shape[1]) for rows, product in zip(blocks, self.products, strict=True)]

    def __call__(
        self, pieces_PCN: np.ndarray, entering_CS: np.ndarray, scratch: list[torch.Tensor]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(energy of the filtered pieces, channels together, float32 (P,); the states behind the last of them).

        pieces_PCN    float32, contiguous
        entering_CS   the states in front of the first piece: zero, or what the call before returned
        scratch       for at least as many pieces
        """
        pieces, channels, _ = pieces_PCN.shape
        energy_P = np.zeros(pieces, np.float32)
        values = torch.from_numpy(pieces_PCN)
        for product, out in zip(self.products, scratch, strict=True):
            blocks = values.view(-1, len(product))
            made = torch.mm(blocks, product, out=out[: len(blocks)])
            own_PKE = made.numpy().reshape(pieces, -1, made.shape[1])[..., : -2 * self.states]
            energy_P += np.einsum("pke,pke->p", own_PKE, own_PKE)
            values = made[:, -2 * self.states :].contiguous()
        last_PCX = values.numpy().reshape(pieces, channels, -1)
        rest_PCS, added_PCS = last_PCX[..., : self.states], last_PCX[..., self.states :]
        rest_PCS[0] += entering_CS
        rest_PCS[1:] += added_PCS[:-1]
        energy_P += np.square(rest_PCS).sum(axis=(1, 2))
        return energy_P, added_PCS[-1]
