"""Operations: for each, one public call and its implementations (see archs/ops/operation.py). They
know nothing of archs.base, which imports them."""

from archs.ops import attention, gated_delta_rule, neural_memory, selective_scan, ssd, ttt_linear, ttt_mlp

#: What a configuration's `implementation` chooses for.
OPERATIONS = (
    attention.OPERATION,
    attention.STEP_OPERATION,
    gated_delta_rule.OPERATION,
    neural_memory.OPERATION,
    selective_scan.OPERATION,
    ssd.OPERATION,
    ttt_linear.OPERATION,
    ttt_mlp.OPERATION,
)
