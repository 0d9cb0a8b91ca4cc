"""Tables of docs/at_once.md and docs/experiments.md: the defaults of before, and how today's was found."""

from result_tables import (
    by_value,
    by_widths,
    commands,
    comparison,
    equal_cost,
    from_scratch,
    other_cuts,
    removal,
    run_commands,
    run_costs,
    streams,
    variants,
)
from runs import Runs, beside_controls, budgets, load, of


def preferred_tables(ato: dict[str, dict[str, Runs]], vgg: Runs, deeper: Runs) -> dict[str, str]:
    """Other preferences of the controller, and times of the cut, beside the default's runs.

    `ato` are those of ResNet-20 by budget, the others those of VGG-11 and ResNet-56.
    """
    default, before = "capacity, 0.5", budgets(load("cifar10-resnet20-"))
    earliest, earlier = budgets(load("cut09-resnet20-")), budgets(load("chains-resnet20-"))
    tried = {
        "capacity, beta=4, 0.09": load("beta4-resnet20-"),
        "capacity, stages in series, 0.15": load("stages-"),
    }
    groups = {
        budget: {
            default: ato[budget]["ato"],
            "capacity, 0.09": earliest[budget]["ato"],
            "capacity, 0.15": earlier[budget]["ato"],
            "weights, 0.15": load(f"{early}-0.15-"),
            "weights, 0.32": before[budget]["ato"],
        }
        for budget, early in (("0.45", "whole"), ("0.3", "whole30"))
    }
    groups["0.45"] |= tried
    groups["vgg"] = {
        default: vgg,
        "capacity, 0.09": load("cut09-vgg11_bn-"),
        "capacity, 0.15": load("chains-vgg11_bn-"),
        "channels, 0.15": load("counted-vgg11_bn-"),
        "weights, 0.15": load("vgg16-cut=0.15-"),
        "weights, 0.32": load("epochs16-vgg11_bn-ato-"),
        "nothing, 0.32": load("vgg16-beta=0-"),
    }
    groups["deeper"] = {
        default: deeper,
        "capacity, 0.09": load("cut09-resnet56-"),
        "capacity, 0.15": load("chains-resnet56-"),
        "weights, 0.32": of("ato", load("epochs16-resnet56-")),
    }
    tables = {
        f"preferred {place}": variants("the controller prefers, cut at", found, default)
        for place, found in groups.items()
    }
    made = [run for runs in tried.values() for run in runs]
    for cut in ("cut09", "chains"):
        for model in ("resnet20", "resnet56", "vgg11_bn"):
            made += load(f"{cut}-{model}-")
    return {**tables, "preferred commands": commands(made)}


def equal_cost_tables(at_45: dict[str, Runs]) -> dict[str, str]:
    """Controls beside longer runs of ato, cut early, that cost no more; `at_45` are the runs of 16 epochs by method."""
    longer, longest, narrow = load("cut09-epochs19-"), load("cut09-epochs32-"), load("epochs22-resnet20-narrow-")
    cut_early, whole = load("epochs19-resnet20-magnitude-"), load("epochs19whole-")
    later, late = load("chains-epochs18-"), load("chains-epochs30-")
    pairs = (
        ("dense", at_45["dense"], longest),
        ("narrow", narrow, longer),
        ("magnitude", at_45["magnitude"], longer),
        ("magnitude, cut at 0.09", cut_early, longer),
        ("magnitude, cut at 0.09, streams whole", whole, longer),
        ("magnitude, streams whole", load("control-streams-45-"), longer),
        ("magnitude, cut at 0.32", load("control-cut32-45-"), longer),
        ("ato, cut at 0.15", later, longer),
        ("ato, cut at 0.15", late, longest),
    )
    made = longer + longest + narrow + cut_early + whole + later + late
    return {
        "equal cost": equal_cost(pairs),
        "equal cost commands": commands(made),
    }


def at_once_tables(controls: Runs) -> dict[str, str]:
    """All of docs/at_once.md; `controls` are the runs of dense, narrow and magnitude on ResNet-20."""
    cifar = controls + load("random50-resnet20-") + load("cut50-resnet20-")
    at_45, ato = budgets(cifar)["0.45"], of("ato", cifar)
    vgg, deeper = beside_controls("vgg11_bn", "cut50"), beside_controls("resnet56", "cut50")
    ablation, own, chance = load("ablation-"), load("own-widths-"), load("early-random-")
    early = load("cut09-resnet20-")
    costs = run_costs(load("run_cost"))
    return {
        "comparison": comparison(cifar),
        "commands": commands(of("random", cifar) + ato),
        "removal": removal(ato, costs),
        "run cost": run_commands(load("run_cost")),
        **equal_cost_tables(at_45),
        "early": comparison(chance + early),
        "early commands": commands(chance),
        "early removal": removal(early, costs),
        **preferred_tables(budgets(ato), of("ato", vgg), of("ato", deeper)),
        "ablation": variants("change", by_value(ablation), "default"),
        "ablation commands": commands(ablation),
        "own widths": from_scratch(own),
        "own widths commands": commands(own),
        "vgg": comparison(vgg),
        "vgg removal": removal(of("ato", vgg), costs),
        "vgg commands": commands(vgg + load("counted-vgg11_bn-")),
        "deeper": comparison(deeper),
        "deeper removal": removal(of("ato", deeper), costs),
        "deeper commands": commands(deeper),
    }


def settings_tables(ato: Runs, ato_30: Runs) -> dict[str, str]:
    """What settings did to the default of before, with residual streams pruned like any other layer, and whole.

    `ato` are its runs at 45 %, `ato_30` those at 30 %.
    """
    pruned = budgets(load("streams-0-"))["0.45"]["ato"]
    beta, cut, smaller = "0.3", "0.32", load("whole30-")
    tables = {
        "cut whole 30": variants("cut at", {**by_value(smaller), cut: ato_30}, cut),
        "cut 30 commands": commands(smaller),
    }
    for place, setting, default, changed, whole in (
        ("weights", "beta", beta, load("capacity-"), load("beta-")),
        ("cut", "cut at", cut, load("cut-"), load("whole-")),
    ):
        tables[place] = variants(setting, {**by_value(changed), default: pruned}, default)
        tables[f"{place} whole"] = variants(setting, {**by_value(whole), default: ato}, default)
        tables[f"{place} commands"] = commands(changed + whole)
    for place, made in (
        ("ablation early", load("cut15-")),
        ("ablation", load("before-")),
        ("ablation pruned", load("pruned-")),
    ):
        tables |= {place: variants("change", by_value(made), "default"), f"{place} commands": commands(made)}
    return tables


def gradual_tables(magnitude: dict[str, dict[str, Runs]]) -> dict[str, str]:
    """What channels weigh, and how many go at a time; `magnitude` has the runs of ResNet-20 in 16 epochs, by budget."""
    at_once, default = budgets(load("cut50-resnet20-")), "norms, a few at a time"
    found = {
        "gradual": (at_once["0.45"]["ato"], "epochs16", magnitude["0.45"]["magnitude"]),
        "gradual 30": (at_once["0.3"]["ato"], "percent30", magnitude["0.3"]["magnitude"]),
        "gradual 32": (load("cut50-epochs32-"), "epochs32", load("epochs32-resnet20-magnitude-")),
    }
    tables, made = {}, []
    for place, (usual, runs, control) in found.items():
        columns, norms, roots = (load(f"{weights}-{runs}-") for weights in ("columns", "gradual", "roots"))
        groups = {"channels, at once": usual, "columns, at once": columns, default: norms}
        groups["roots of norms, a few at a time"] = roots
        groups["cut by magnitude at half time"] = control
        tables[place] = variants(
            "what channels weigh, and how they go", {k: v for k, v in groups.items() if v}, default
        )
        made += columns + norms + roots
    return {**tables, "gradual commands": commands(made)}


def experiments_tables(cifar: Runs) -> dict[str, str]:
    """All of docs/experiments.md; `cifar` are the runs of ResNet-20 with the default of before."""
    at_45, at_30 = budgets(cifar)["0.45"], budgets(cifar)["0.3"]
    longer, early, narrow = load("epochs18-resnet20-ato-"), load("early18-"), load("epochs22-resnet20-narrow-")
    longest, scratch, by_hand = load("epochs25-resnet20-ato-"), load("scratch-"), load("hand-")
    equal = (
        ("dense", at_45["dense"], longest),
        ("narrow", narrow, at_45["ato"]),
        ("narrow; ato cuts at 0.15", narrow, early),
        ("magnitude", at_45["magnitude"], longer),
        ("magnitude; ato cuts at 0.15", at_45["magnitude"], early),
    )
    found = [run for run in scratch if run["name"].startswith("scratch-resnet20-ato-45-")]
    strongest, streams_pruned, streams_whole = load("which-"), load("streams-0-"), load("control-streams-")
    vgg, vgg_longer, vgg_longest = (load(f"{run}-vgg11_bn-") for run in ("cifar10", "epochs8", "epochs16"))
    floor, vgg_changed, vgg_weighed = load("floor-vgg11_bn-"), load("vgg11-"), load("vgg16-")
    deeper = load("epochs16-resnet56-"), load("epochs4-resnet56-")
    lengths = {"weights, 0.32": longer, "weights, 0.15": early, "capacity, 0.15": load("chains-epochs18-")}
    return {
        "before": comparison(cifar),
        "longer": variants("the controller prefers, cut at", lengths, "weights, 0.32"),
        "before commands": commands(of("ato", cifar) + of("random", cifar)),
        "equal cost": equal_cost(equal),
        "equal cost commands": commands(longer + early + longest),
        "from scratch": from_scratch(scratch),
        "from scratch commands": commands(scratch),
        "by hand": variants("inner widths, MACs kept", {**by_widths(by_hand), "ato's": found}, "ato's"),
        "by hand commands": commands(by_hand),
        "which": variants("channels by", {**by_value(strongest), "controller": at_45["ato"]}, "controller"),
        "which commands": commands(strongest),
        "streams": streams(
            streams_pruned + of("magnitude", cifar), of("ato", cifar) + of("random", cifar) + streams_whole
        ),
        "streams commands": commands(streams_pruned),
        **settings_tables(at_45["ato"], at_30["ato"]),
        **gradual_tables(budgets(cifar)),
        "vgg": comparison(vgg),
        "vgg controls": other_cuts(floor, vgg),
        "vgg changed": variants("change", {**by_value(vgg_changed), "default": of("ato", vgg)}, "default"),
        "vgg longer": comparison(vgg_longer),
        "vgg longest": comparison(vgg_longest),
        "vgg weighed": variants("change", {**by_value(vgg_weighed), "default": of("ato", vgg_longest)}, "default"),
        "vgg commands": commands(vgg + floor + vgg_changed + vgg_longer + vgg_longest + vgg_weighed),
        "deeper": comparison(deeper[0]),
        "deeper short": comparison(deeper[1]),
        "deeper commands": commands(deeper[0] + deeper[1]),
    }
