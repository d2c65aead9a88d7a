"""``serve --site`` is for those who want to be sure that it is a site."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from stationkey import cli


def test_without_stations_in_the_configuration_it_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "stationkey.toml"
    config.write_text('keystore = "software:"\nallow_software_keys = true\n')

    result = CliRunner().invoke(cli.main, ["serve", "--site", "--config", str(config), "--state-dir", str(tmp_path)])

    assert result.exit_code == 1
    assert "[site] stations" in result.output
    assert list(tmp_path.iterdir()) == [config]
