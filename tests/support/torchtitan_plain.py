"""What the Trainer has to equal: one process, the whole batch at once, a plain loop over experts; no dmoe, no ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchtitan_model import ADAM, BIAS_STEP, LEARNING_RATE, MAX_NORM, SEQUENCES, STEPS, VOCABULARY, batch, spec


def plain_experts(experts, x, scores, ids):
    """``(B, L, H)``: each token's experts, one expert after the other, in the weights' dtype."""
    tokens, scores, ids = x.reshape(-1, x.shape[-1]), scores.flatten(0, 1), ids.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for expert in range(experts.num_experts):
        which, choice = (ids == expert).nonzero(as_tuple=True)
        rows = tokens[which]
        if hasattr(experts, "w1_EFD"):
            hidden = F.silu(rows @ experts.w1_EFD[expert].T) * (rows @ experts.w3_EFD[expert].T)
            y = hidden @ experts.w2_EDF[expert].T
        else:  # GPT-OSS
            both = rows @ experts.mlp1_weight_EGD[expert].T + experts.mlp1_bias_EG[expert]
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            y = hidden @ experts.mlp2_weight_EDF[expert].T + experts.mlp2_bias_ED[expert]
        out = out.index_add(0, which, y * scores[which, choice, None].to(y.dtype))
    return out.view_as(x)


def plain_forward(routed):
    """Let a module of torchtitan's RoutedExperts compute by the loop."""
    routed.forward = lambda x, scores, ids, counts: plain_experts(routed.inner_experts, x, scores, ids)


def plain_model(name, state):
    model = spec(name).model.build()
    model.init_weights()
    model.load_state_dict(state)
    for module in model.modules():
        if hasattr(module, "inner_experts"):
            plain_forward(module)
    return model.train()


def train_plainly(name, state):
    """Losses, norms before clipping and the state after all steps."""
    model = plain_model(name, state)
    mixtures = [block.moe for block in model.layers.values() if block.moe_enabled]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, **ADAM, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        inputs, labels = batch(range(step * SEQUENCES, (step + 1) * SEQUENCES))
        logits = model(inputs, positions=torch.arange(inputs.shape[1]).expand_as(inputs))
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1), ignore_index=-100)  # mean of tokens
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        for moe in mixtures:  # before the step, as torchtitan's hook does
            load = moe.tokens_per_expert_E
            step_of = BIAS_STEP * torch.sign(load.mean() - load)
            moe.expert_bias_E += step_of - step_of.mean()
            moe.tokens_per_expert_E.zero_()
        optimizer.step()
        losses.append(float(loss))
    return {
        "losses": losses,
        "norms": norms,
        "state": {name: value.detach() for name, value in model.state_dict().items()},
    }
