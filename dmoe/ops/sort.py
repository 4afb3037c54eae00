"""Plain PyTorch for now; the compiled operation follows."""
import torch
def sort(k,end_bit=None):
    a,b=torch.sort(k,stable=True); return a,b.to(torch.int32)
