"""Configs: every setting of a run, its default and its allowed values."""

from occ_jax.config.dictionaries import (
    differences as differences,
    flatten as flatten,
    from_dict as from_dict,
    model_from_dict as model_from_dict,
    to_dict as to_dict,
)
from occ_jax.config.experiment import (
    Aggregation as Aggregation,
    AlgorithmConfig as AlgorithmConfig,
    Config as Config,
    DatasetConfig as DatasetConfig,
    Estimator as Estimator,
    HeadLoss as HeadLoss,
    MeshConfig as MeshConfig,
    MTPConfig as MTPConfig,
    OptimizerConfig as OptimizerConfig,
    Regime as Regime,
    RewardConfig as RewardConfig,
    RolloutConfig as RolloutConfig,
    RunConfig as RunConfig,
    TaskConfig as TaskConfig,
    TaskName as TaskName,
    Thinking as Thinking,
    Verifier as Verifier,
    WarmStartConfig as WarmStartConfig,
    computation as computation,
)
from occ_jax.config.facts import (
    Fact as Fact,
    fields_with as fields_with,
)
from occ_jax.config.model import (
    AttentionKernel as AttentionKernel,
    ConcatOrder as ConcatOrder,
    DeltaNetConfig as DeltaNetConfig,
    DType as DType,
    LatentAttentionConfig as LatentAttentionConfig,
    ModelConfig as ModelConfig,
    MoEConfig as MoEConfig,
    TrunkHidden as TrunkHidden,
    YarnConfig as YarnConfig,
)
