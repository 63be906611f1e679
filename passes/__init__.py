"""The passes, one file each: a frozen configuration, the rewrite, its metrics."""

from carve.passes.allocate import Allocate, AllocateConfig
from carve.passes.carve import Carve, CarveConfig
from carve.passes.choose_widths import ChooseWidths, ChooseWidthsConfig
from carve.passes.compensate import Compensate, CompensateConfig
from carve.passes.distill import Distill, DistillConfig
from carve.passes.finetune import Finetune, FinetuneConfig
from carve.passes.gate import GateConfig, SkipGates
from carve.passes.place import Place, PlaceConfig
from carve.passes.place_gates import PlaceGates, PlaceGatesConfig
from carve.passes.profile import Profile, ProfileConfig
from carve.passes.quantize import Quantize, QuantizeConfig
from carve.passes.refit import Refit, RefitConfig
from carve.passes.route_analytical import RouteAnalytical, RouteAnalyticalConfig
from carve.passes.route_ridge import RouteRidge, RouteRidgeConfig
from carve.passes.smooth import Smooth, SmoothConfig
from carve.passes.tune_grids import TuneGrids, TuneGridsConfig

__all__ = [
    "Allocate",
    "AllocateConfig",
    "Carve",
    "CarveConfig",
    "ChooseWidths",
    "ChooseWidthsConfig",
    "Compensate",
    "CompensateConfig",
    "Distill",
    "DistillConfig",
    "Finetune",
    "FinetuneConfig",
    "GateConfig",
    "Place",
    "PlaceConfig",
    "PlaceGates",
    "PlaceGatesConfig",
    "Profile",
    "ProfileConfig",
    "Quantize",
    "QuantizeConfig",
    "Refit",
    "RefitConfig",
    "RouteAnalytical",
    "RouteAnalyticalConfig",
    "RouteRidge",
    "RouteRidgeConfig",
    "SkipGates",
    "Smooth",
    "SmoothConfig",
    "TuneGrids",
    "TuneGridsConfig",
]
