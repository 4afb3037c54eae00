"""Plain PyTorch for now; the compiled operation follows."""
import torch
def exclusive_cumsum(x,dim): return (torch.cumsum(x,dim)-x).to(x.dtype)
def inclusive_cumsum(x,dim): return torch.cumsum(x,dim).to(x.dtype)
