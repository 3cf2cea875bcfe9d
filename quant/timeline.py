"""Time as an axis: which segment of the denoising trajectory a forward pass belongs to."""
import torch


class Timeline:
    """Segments of the network's step axis. `boundaries` are ascending step values; step t lies in segment
    #{b : b <= t}. Without boundaries there is one segment and every quantizer is static.

    `segment` is an int, or (N,) when the samples of a batch lie in several segments; a pre-hook on the network reads
    t and sets it, so that no call is ever counted.
    """

    def __init__(self, boundaries=()):
        self.boundaries = torch.tensor(sorted(boundaries), dtype=torch.float32)
        self.segment = 0

    @property
    def num_segments(self):
        return len(self.boundaries) + 1

    def set_time(self, t):
        """t (N,) steps of the samples in the coming forward pass."""
        if self.num_segments == 1:
            return
        segment = torch.bucketize(t.float(), self.boundaries.to(t.device), right=True)
        self.segment = int(segment[0]) if bool((segment == segment[0]).all()) else segment

    def follow(self, net):
        """Read t from every forward pass of `net` (called as net(x, t, ...))."""
        net.register_forward_pre_hook(lambda module, arguments: self.set_time(arguments[1]))
