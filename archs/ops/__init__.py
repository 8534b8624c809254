"""Operations: for each, one public call and its implementations (see archs/ops/operation.py)."""
