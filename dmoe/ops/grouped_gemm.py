"""Plain PyTorch for now; the compiled operation follows."""
import torch
def grouped_gemm(a,b,off,trans_b=True):
    o=off.tolist(); outs=[]
    out=a.new_zeros(a.shape[0], b.shape[1] if trans_b else b.shape[2])
    parts=[a[o[e]:o[e+1]] @ (b[e].t() if trans_b else b[e]) for e in range(len(o)-1)]
    parts.append(out[o[-1]:]); return torch.cat(parts)
def grouped_gemm_weight(a,b,off,E):
    o=off.tolist(); return torch.stack([a[o[e]:o[e+1]].t()@b[o[e]:o[e+1]] for e in range(E)])
