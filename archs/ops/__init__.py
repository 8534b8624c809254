"""Operations: for each, one public call and its implementations (see archs/ops/operation.py). They import
nothing of archs outside this folder."""

from archs.ops import (
    attention,
    gated_delta_rule,
    neural_memory,
    segment_attention,
    selective_scan,
    ssd,
    ttt_linear,
    ttt_mlp,
)

#: The operations that a configuration's `implementation` chooses for.
OPERATIONS = (
    attention.OPERATION,
    attention.STEP_OPERATION,
    gated_delta_rule.OPERATION,
    neural_memory.OPERATION,
    segment_attention.OPERATION,
    selective_scan.OPERATION,
    ssd.OPERATION,
    ttt_linear.OPERATION,
    ttt_mlp.OPERATION,
)
