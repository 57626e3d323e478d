"""AdaptedModel: made by `adapt`, probed, saved, loaded, used."""

from svp.model.adapted import AdaptedModel, Prediction
from svp.model.adapting import MethodSpec, adapt
from svp.model.folder import read_json, write_folder
from svp.model.loading import load, predict

__all__ = ["AdaptedModel", "MethodSpec", "Prediction", "adapt", "load", "predict", "read_json", "write_folder"]
