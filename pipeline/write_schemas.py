"""JSON Schemas of report and manifest, made from the models that check them: ``python -m pipeline.write_schemas``."""

import json
from pathlib import Path

from pipeline.device_report import DeviceReport
from pipeline.manifest import Manifest
from pipeline.report import Report

FOLDER = Path(__file__).resolve().parent / "schemas"
MODELS = {"report.schema.json": Report, "manifest.schema.json": Manifest, "device-report.schema.json": DeviceReport}


def schema_text(name: str) -> str:
    """The schema file ``name`` as it should be."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **MODELS[name].model_json_schema(mode="serialization")}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def main() -> None:
    for name in MODELS:
        (FOLDER / name).write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
