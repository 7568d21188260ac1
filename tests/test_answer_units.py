"""A measure in another unit of its kind is the same answer; the same number in another unit is not."""

import pytest

from internvl_mpo.answers.comparing import Outcome, compare_answers

EQUAL = [
    *("1 m = 1000 mm", "1 m = 100 cm", "2 m = 20 dm", "3 km = 3000 m", "1 cm = 10 mm", "24 inches = 2 feet"),
    *("6 feet = 2 yards", "5 g = 5000 mg", "2 kg = 2000 g", "2 s = 2000 ms", "5 min = 300 s", "2 h = 120 minutes"),
    *("3 hours = 10800 seconds", "2 days = 48 hours", "3 weeks = 21 days", "2 l = 2000 ml", "3 kJ = 3000 J"),
    *("4 kW = 4000 W", "5 kN = 5000 N", "2 kV = 2000 V", "3 A = 3000 mA", "2 kΩ = 2000 Ω", "2 kHz = 2000 Hz"),
    *("2 MHz = 2000 kHz", "3 GHz = 3000 MHz", "36 km/h = 10 m/s", "2 km/s = 2000 m/s", "1 m^2 = 10000 cm^2"),
    *("2 km^2 = 2000000 m^2", "1 m^3 = 1000000 cm^3", "212 °F = 100 °C", "32 °F = 0 °C", "-40 °F = -40 °C"),
    *("2 米 = 200 厘米", "3 千米 = 3000 米", "3 公里 = 3000 米", "2 厘米 = 20 毫米", "2 千克 = 2000 克"),
    *("2 公斤 = 2000 克", "3 分钟 = 180 秒", "2 小时 = 120 分钟", "5 kilometers = 5000 meters"),
    *("5 kilometres = 5000 metres", "2 centimeters = 20 millimeters", "2 centimetres = 20 millimetres"),
    *("2 kilograms = 2000 grams", "3 litres = 3000 ml", "2 liters = 2000 milliliters", "2 hrs = 7200 sec"),
    *("50 percent = 50%", "50 per cent = 50 pct", "90 degrees = 90°", "90 deg = 90°", "90度 = 90°"),
]


def is_right(prediction: str, gold: str) -> bool:
    return compare_answers(prediction, gold).outcome is Outcome.RIGHT


@pytest.mark.parametrize("line", EQUAL)
def test_units_of_one_kind_are_converted_both_ways(line):
    one, other = line.split(" = ")
    assert is_right(one, other)
    assert is_right(other, one)
    number, unit = other.split(" ", 1) if " " in other else (other.rstrip("°%度"), other[-1])
    for wrong in (f"{10 * int(number) + 7} {unit}", f"{int(number) + 1} {unit}"):
        assert not is_right(one, wrong)
        assert not is_right(wrong, one)


@pytest.mark.parametrize("pair", ["5 m = 5 cm", "5 kg = 5 g", "5 h = 5 min", "5 l = 5 ml", "5 kg = 5 m", "5 °C = 5 °F"])
def test_the_same_number_in_another_unit_is_another_answer(pair):
    one, other = pair.split(" = ")
    assert not is_right(one, other)
    assert not is_right(other, one)
