"""Adversarial weight perturbation and robust training for JAX and Flax."""

from awp_jax.attacks.apgd import apgd as apgd
from awp_jax.attacks.apgd import apgd_spec as apgd_spec
from awp_jax.attacks.autoattack import auto_attack as auto_attack
from awp_jax.attacks.autoattack import make_specs as make_specs
from awp_jax.attacks.fab import fab as fab
from awp_jax.attacks.fab import fab_spec as fab_spec
from awp_jax.attacks.fixed_step import cw_attack as cw_attack
from awp_jax.attacks.fixed_step import pgd_spec as pgd_spec
from awp_jax.attacks.fixed_step import transfer_attack as transfer_attack
from awp_jax.attacks.pgd import fgsm as fgsm
from awp_jax.attacks.pgd import pgd as pgd
from awp_jax.attacks.pgd import pgd_with_state as pgd_with_state
from awp_jax.attacks.spsa import spsa as spsa
from awp_jax.attacks.spsa import spsa_spec as spsa_spec
from awp_jax.attacks.square import square as square
from awp_jax.attacks.square import square_spec as square_spec
from awp_jax.awp import awp_perturbation as awp_perturbation
from awp_jax.awp import awp_step as awp_step
from awp_jax.awp import awp_value_and_grad as awp_value_and_grad
from awp_jax.core.rewriting import cpu_convolutions as cpu_convolutions
from awp_jax.evaluation.evaluate import EvalOptions as EvalOptions
from awp_jax.evaluation.evaluate import evaluate as evaluate
from awp_jax.evaluation.export import SavedExamples as SavedExamples
from awp_jax.evaluation.export import load_examples as load_examples
from awp_jax.evaluation.export import result_to_dict as result_to_dict
from awp_jax.evaluation.export import save_examples as save_examples
from awp_jax.evaluation.protocol import AttackSpec as AttackSpec
from awp_jax.evaluation.results import AttackResult as AttackResult
from awp_jax.evaluation.results import BatchResult as BatchResult
from awp_jax.evaluation.results import Judgement as Judgement
from awp_jax.evaluation.results import RobustnessWarning as RobustnessWarning
from awp_jax.evaluation.results import Share as Share
from awp_jax.evaluation.results import (
    confidence_interval as confidence_interval,
)
from awp_jax.landscape import evaluate_points as evaluate_points
from awp_jax.landscape import filter_normalize as filter_normalize
from awp_jax.landscape import mean_rise as mean_rise
from awp_jax.landscape import random_direction as random_direction
from awp_jax.landscape import robust_measure as robust_measure
from awp_jax.measures.curve import RobustCurve as RobustCurve
from awp_jax.measures.curve import robust_curve as robust_curve
from awp_jax.measures.minimal import (
    MinimalPerturbations as MinimalPerturbations,
)
from awp_jax.measures.minimal import (
    minimal_perturbations as minimal_perturbations,
)
from awp_jax.measures.targeted import TargetedResult as TargetedResult
from awp_jax.measures.targeted import targeted_attack as targeted_attack
from awp_jax.objectives import Objective as Objective
from awp_jax.objectives import adversarial as adversarial
from awp_jax.objectives import cross_entropy as cross_entropy
from awp_jax.objectives import cw_margin as cw_margin
from awp_jax.objectives import is_correct as is_correct
from awp_jax.objectives import kl_divergence as kl_divergence
from awp_jax.objectives import mart as mart
from awp_jax.objectives import natural as natural
from awp_jax.objectives import trades as trades
from awp_jax.perturbation import methods as methods
from awp_jax.perturbation.balls import Ball as Ball
from awp_jax.perturbation.base import Method as Method
from awp_jax.perturbation.base import MethodState as MethodState
from awp_jax.perturbation.leaves import is_weight as is_weight
from awp_jax.perturbation.leaves import weight_mask as weight_mask
from awp_jax.perturbation.optimizer import (
    perturbed_optimizer as perturbed_optimizer,
)
from awp_jax.perturbation.perturbed_step import (
    find_perturbation as find_perturbation,
)
from awp_jax.perturbation.perturbed_step import perturbed_step as perturbed_step
from awp_jax.perturbation.perturbed_step import (
    perturbed_value_and_grad as perturbed_value_and_grad,
)
from awp_jax.perturbation.value_and_grad import accumulated as accumulated
from awp_jax.threat import ThreatModel as ThreatModel
from awp_jax.training.averaging import Average as Average
from awp_jax.training.averaging import ema_decay as ema_decay
from awp_jax.training.averaging import update_average as update_average
from awp_jax.training.train_step import Attack as Attack
from awp_jax.training.train_step import EvalMetrics as EvalMetrics
from awp_jax.training.train_step import TrainMetrics as TrainMetrics
from awp_jax.training.train_step import TrainState as TrainState
from awp_jax.training.train_step import eval_step as eval_step
from awp_jax.training.train_step import train_step as train_step
from awp_jax.types import AWPOutput as AWPOutput
from awp_jax.types import ForwardFn as ForwardFn
from awp_jax.types import PerturbedOutput as PerturbedOutput
from awp_jax.version import __version__ as __version__
