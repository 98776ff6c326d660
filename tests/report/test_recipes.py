from earlyexit_ssd.report.recipes import recipe_table


def trial(recipe, seed, ap50, **more):
    return {
        "recipe": recipe,
        "seed": seed,
        "minutes": 3.0 + seed,
        "AP50": {"exit8": ap50, "full": 0.7},
        "mmacs": {"exit8": 250.4, "full": 600.0},
        "parameters": {"exit8": 1_234_567},
        **more,
    }


def test_seeds_of_a_recipe_are_one_row():
    table = recipe_table([trial("thin", 0, 0.5), trial("wide", 0, 0.6), trial("thin", 1, 0.54)]).splitlines()
    assert table[0] == "| recipe | seeds | minutes | exit8 AP50 | exit8 MMAC | exit8 M param. |"
    assert table[2] == "| thin | 2 | 3.5 | 0.520 (0.500 to 0.540) | 250 | 1.23 |"
    assert table[3] == "| wide | 1 | 3.0 | 0.600 | 250 | 1.23 |"


def test_an_exit_that_a_recipe_lacks_is_a_dash():
    other = trial("two", 0, 0.5, AP50={"exit4": 0.1}, mmacs={"exit4": 9.0}, parameters={"exit4": 10_000})
    assert recipe_table([trial("thin", 0, 0.5), other]).splitlines()[3] == (
        "| two | 1 | 3.0 | - | - | - | 0.100 | 9 | 0.01 |"
    )
