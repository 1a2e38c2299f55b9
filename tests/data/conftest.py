"""Every test of this folder prepares its data in one temporary folder a session, never in the user's."""

import pytest


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def data_dir(prepared_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_folder))
    return prepared_folder
