"""How tests/archs/ops/test_operations.py calls each operation: its inputs, its outputs and the cases to try.

Every operation gets the same tests. A new one needs an entry in SUBJECTS; a new implementation needs nothing.
"""

from tests.archs.ops.subjects.attention import ATTENTION, ATTENTION_STEP, SEGMENT_ATTENTION
from tests.archs.ops.subjects.base import Subject
from tests.archs.ops.subjects.memory import NEURAL_MEMORY
from tests.archs.ops.subjects.scans import GATED_DELTA_RULE, SELECTIVE_SCAN, SSD
from tests.archs.ops.subjects.ttt import TTT_LINEAR, TTT_MLP

SUBJECTS: dict[str, Subject] = {
    "attention": ATTENTION,
    "attention_step": ATTENTION_STEP,
    "gated_delta_rule": GATED_DELTA_RULE,
    "neural_memory": NEURAL_MEMORY,
    "segment_attention": SEGMENT_ATTENTION,
    "selective_scan": SELECTIVE_SCAN,
    "ssd": SSD,
    "ttt_linear": TTT_LINEAR,
    "ttt_mlp": TTT_MLP,
}
