"""Additional scan: its new decay of states is not decayed."""

from methods.nets import net_of
from svp.model import adapt
from svp.training.optim import parameter_groups
from svp.training.recipe import Recipe


def test_a_new_decay_of_states_is_not_pulled_to_one():
    model = adapt(net_of("vim"), "additional_scan", num_classes=3)
    groups = parameter_groups(model.named_parameters(), Recipe(lr=1.0, weight_decay=0.1), model.method.groups())
    decayed = {name.split(".")[1] for group in groups if group["weight_decay"] for name in group["names"]}
    assert decayed == {"B", "C", "weight"}
