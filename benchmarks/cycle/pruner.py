"""Clear the channels that a network misses least, whatever network it is.

srfx says which weights leave together (`srfx.cycle.groups`).  What clearing a group costs the loss is estimated to
first order by the sum of weight times gradient over the group, squared and averaged over batches (Molchanov et al.,
Importance Estimation for Neural Network Pruning, 2019, eq. 8).  The groups with the least of it per parameter go.
"""

import torch
from torch import Tensor, nn

from srfx.cycle.groups import NO_GROUP, ChannelGroups


class LeastMissed:
    """Collects importances over a few batches, then clears.

    Args:
        groups: of the model; made anew after each minimize.
        model: what the groups were made of.
    """

    def __init__(self, groups: ChannelGroups, model: nn.Module) -> None:
        self.groups = groups
        self.parameters = dict(model.named_parameters())
        self.importance = torch.zeros(groups.n_groups)
        self.sizes = self._sums({name: torch.ones_like(p) for name, p in self.parameters.items()})

    def _sums(self, tensors: dict[str, Tensor]) -> Tensor:
        """The sum of each group over all its places."""
        total = torch.zeros(self.groups.n_groups + 1)  # the last one takes what belongs to no group
        for s in self.groups.slices:
            over = [a for a, n in enumerate(s.groups.shape) if n == 1 and tensors[s.name].shape[a] > 1]
            part = tensors[s.name].sum(over) if over else tensors[s.name]
            total.index_add_(
                0, s.groups.reshape(-1) % len(total), part.reshape(-1)
            )  # NO_GROUP is -1: the last
        return total[:-1]

    @torch.no_grad()
    def add(self) -> None:
        """Take in the gradients that lie in the parameters; call it after each backward."""
        slopes = {
            name: torch.zeros_like(p) if p.grad is None else p * p.grad for name, p in self.parameters.items()
        }
        self.importance += self._sums(slopes).square()

    @torch.no_grad()
    def clear(self, share: float, most_of_an_axis: float = 0.5) -> int:
        """Zero groups until `share` of all parameters would leave; what leaves in fact, srfx finds.

        Args:
            share: of the parameters.
            most_of_an_axis: so much of one axis of one parameter goes at most, and always one channel.

        Returns:
            how many groups were cleared.
        """
        worth = self.importance / self.sizes
        may_go = torch.ones_like(worth, dtype=torch.bool)
        for s in self.groups.slices:
            members = s.groups[s.groups != NO_GROUP].unique()
            n_stay = len(members) - max(1, int(len(members) * most_of_an_axis))
            may_go[members[worth[members].argsort(descending=True)[:n_stay]]] = False
        order = worth.argsort()
        order = order[may_go[order]]
        budget = share * sum(p.numel() for p in self.parameters.values())
        gone = torch.zeros(self.groups.n_groups + 1, dtype=torch.bool)
        gone[order[self.sizes[order].cumsum(0) < budget]] = True
        for s in self.groups.slices:
            self.parameters[s.name].masked_fill_(gone[s.groups], 0.0)
        return int(gone.sum())
