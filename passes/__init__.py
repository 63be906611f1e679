"""The passes, one file each: a frozen configuration, the rewrite, its metrics."""

from carve.passes.carve import Carve, CarveConfig
from carve.passes.compensate import Compensate, CompensateConfig
from carve.passes.profile import Profile, ProfileConfig
from carve.passes.route_analytical import RouteAnalytical, RouteAnalyticalConfig
from carve.passes.route_ridge import RouteRidge, RouteRidgeConfig

__all__ = [
    "Carve",
    "CarveConfig",
    "Compensate",
    "CompensateConfig",
    "Profile",
    "ProfileConfig",
    "RouteAnalytical",
    "RouteAnalyticalConfig",
    "RouteRidge",
    "RouteRidgeConfig",
]
