"""The tensors of a call on a GPU, by way of PyTorch, and the rule as the PyTorch operations that a call replaces."""

import torch

from hawk_trt.stages import BIAS_KEEP

from .cases import Case
from .kernel_library import Addresses, TopK


class Buffers:
    """A case's tensors on the GPU."""

    def __init__(self, case: Case, library: TopK) -> None:
        self.sizes = case.sizes
        self.head_scores = torch.from_numpy(case.head_scores).cuda()
        self.head_weights = torch.from_numpy(case.head_weights).cuda()
        self.visual_rows = torch.from_numpy(case.visual_rows).cuda()
        self.select_bias = torch.from_numpy(case.select_bias).cuda()
        shape = (case.sizes.batch, case.sizes.seq_len)
        self.kept_indices = torch.full((case.sizes.batch, case.num_kept), -1, dtype=torch.int32, device="cuda")
        self.scores = torch.full(shape, float("nan"), device="cuda")
        size = max(library.workspace_bytes(case.sizes), 1)
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def enqueue(self, library: TopK) -> None:
        """Enqueue a call on PyTorch's current stream."""
        addresses = Addresses(
            self.head_scores.data_ptr(),
            self.head_weights.data_ptr(),
            self.visual_rows.data_ptr(),
            self.select_bias.data_ptr(),
            self.kept_indices.data_ptr(),
            self.scores.data_ptr(),
        )
        library.enqueue(addresses, self.sizes, self.workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)

    def forget(self) -> None:
        """Put garbage where the answer goes."""
        self.kept_indices.fill_(-1)
        self.scores.fill_(float("nan"))

    def enqueue_torch(self) -> torch.Tensor:
        """The same rule, L2, as PyTorch operations; its ties may fall otherwise."""
        visual = self.visual_rows >= 0
        usable = visual[:, None, :] & torch.isfinite(self.head_scores)
        raw = torch.where(usable, self.head_scores, 0.0)
        norm = torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp_min(1e-12)
        scores = torch.matmul(self.head_weights, raw / norm)
        scores = torch.where(visual, scores, 0.0)
        keys = torch.where(self.select_bias.abs() >= BIAS_KEEP, self.select_bias, scores + self.select_bias)
        best = torch.topk(keys, self.sizes.num_kept, sorted=False).indices
        return torch.sort(best.int()).values
