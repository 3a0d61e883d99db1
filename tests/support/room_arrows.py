"""The rooms and their allowed arrows; tests/project/test_imports.py compares them with the code."""

ARROWS = {
    "converter": (
        "converter.calibration converter.checkpoint converter.checkpoint.adapters "
        "converter.checkpoint.shards converter.cli converter.conversion converter.forward "
        "converter.journal converter.output converter.recipe converter.solvers formats "
        "formats.files formats.repair"
    ),
    "converter.calibration": (
        "converter converter.checkpoint converter.forward converter.solvers formats formats.files"
    ),
    "converter.checkpoint": (
        "converter converter.checkpoint.adapters converter.checkpoint.shards converter.journal "
        "formats formats.config formats.files"
    ),
    "converter.checkpoint.adapters": (
        "converter.checkpoint.shards formats formats.config formats.files formats.hub"
    ),
    "converter.checkpoint.shards": (
        "converter.journal formats formats.config formats.files formats.hub"
    ),
    "converter.cli": "converter converter.cli.show",
    "converter.cli.chat": (
        "converter.cli.show converter.cli.steps formats loader.serving loader.serving.answers "
        "loader.serving.http loader.serving.prompts"
    ),
    "converter.cli.commands": (
        "converter converter.checkpoint converter.checkpoint.shards converter.cli.chat "
        "converter.cli.options converter.cli.show converter.cli.steps "
        "converter.conversion converter.gguf converter.publish converter.solvers.native "
        "formats formats.files formats.hub "
        "formats.reading formats.repair loader loader.arithmetic loader.cuda "
        "loader.decode loader.evaluation loader.experts loader.hf.loading loader.hf.modules "
        "loader.planning loader.serving loader.serving.answers loader.serving.http "
        "loader.serving.prefixes loader.serving.prompts loader.traces"
    ),
    "converter.cli.options": "converter.solvers formats formats.files loader.serving.answers",
    "converter.cli.show": (
        "converter.conversion converter.output converter.recipe formats formats.files loader.traces"
    ),
    "converter.cli.steps": (
        "converter converter.calibration converter.checkpoint "
        "converter.checkpoint.adapters converter.checkpoint.shards converter.cli.show "
        "converter.forward "
        "converter.output converter.publish converter.recipe formats formats.config formats.hub "
        "formats.reading loader loader.arithmetic loader.budget loader.cuda.device "
        "loader.decode loader.evaluation loader.experts loader.hf.loading loader.planning "
        "loader.serving loader.serving.http loader.traces"
    ),
    "converter.conversion": (
        "converter converter.calibration converter.checkpoint converter.checkpoint.adapters "
        "converter.checkpoint.shards converter.journal converter.output "
        "converter.publish converter.recipe converter.solvers formats formats.config "
        "formats.files"
    ),
    "converter.forward": "converter.checkpoint formats formats.files",
    "converter.gguf": "converter formats formats.files formats.reading",
    "converter.journal": "converter formats formats.config formats.files",
    "converter.output": (
        "converter converter.calibration converter.checkpoint converter.checkpoint.adapters "
        "converter.journal converter.publish converter.recipe converter.solvers formats "
        "formats.config formats.files"
    ),
    "converter.publish": (
        "converter.recipe converter.solvers formats formats.config formats.files formats.hub"
    ),
    "converter.recipe": (
        "converter.calibration converter.solvers converter.solvers.native formats "
        "formats.config formats.files"
    ),
    "converter.solvers": "converter converter.solvers.native formats formats.files",
    "converter.solvers.native": "converter formats formats.native",
    "formats": "formats.config formats.files",
    "formats.config": "formats formats.files",
    "formats.files": "formats",
    "formats.hub": "formats formats.config formats.files formats.reading formats.repair",
    "formats.native": "",
    "formats.reading": "formats formats.config formats.files",
    "formats.repair": "formats formats.config formats.files",
    "loader": (
        "formats formats.config formats.files formats.hub formats.reading "
        "loader.arithmetic loader.budget loader.cuda loader.cuda.decode "
        "loader.cuda.device loader.cuda.experts loader.decode loader.experts loader.hf "
        "loader.hf.adapters loader.hf.by_name loader.hf.loading loader.hf.modules"
    ),
    "loader.arithmetic": "formats formats.native formats.reading loader.lifetime",
    "loader.budget": "formats formats.files",
    "loader.cuda": "formats formats.hub loader.cuda.device loader.cuda.products",
    "loader.cuda.decode": (
        "formats formats.reading loader.arithmetic loader.cuda.device "
        "loader.cuda.experts loader.cuda.products loader.decode loader.experts"
    ),
    "loader.cuda.device": "formats formats.files formats.reading loader.arithmetic",
    "loader.cuda.experts": (
        "formats formats.reading loader.arithmetic loader.budget loader.cuda.device "
        "loader.cuda.products loader.experts loader.lifetime"
    ),
    "loader.cuda.products": "formats loader.arithmetic loader.cuda.device loader.lifetime",
    "loader.decode": (
        "formats formats.native loader.arithmetic loader.experts loader.hf.modules loader.lifetime"
    ),
    "loader.evaluation": "formats loader.hf loader.hf.modules",
    "loader.experts": "formats formats.reading loader.budget loader.lifetime",
    "loader.hf": (
        "formats formats.files loader.arithmetic loader.decode loader.experts loader.hf.modules "
        "loader.lifetime"
    ),
    "loader.hf.adapters": "formats formats.files loader.hf.by_name loader.hf.modules",
    "loader.hf.by_name": "formats formats.config formats.hub loader.hf loader.hf.loading",
    "loader.hf.loading": (
        "formats formats.config formats.files formats.reading loader.arithmetic "
        "loader.experts loader.hf loader.hf.modules"
    ),
    "loader.hf.modules": "formats loader.arithmetic loader.experts",
    "loader.lifetime": "formats",
    "loader.planning": (
        "formats loader loader.budget loader.cuda.experts loader.experts loader.traces"
    ),
    "loader.serving": (
        "formats formats.config loader.hf.loading loader.serving.answers "
        "loader.serving.prefixes loader.serving.prompts"
    ),
    "loader.serving.answers": "formats loader.hf loader.hf.loading loader.serving.prefixes",
    "loader.serving.http": "formats loader.serving loader.serving.answers loader.serving.prompts",
    "loader.serving.prefixes": "loader.hf",
    "loader.serving.prompts": "formats loader.serving.answers",
    "loader.traces": (
        "formats formats.config formats.files loader.budget loader.evaluation "
        "loader.experts loader.hf.loading loader.hf.modules loader.serving.prompts"
    ),
}
"""Room -> rooms that it may import, separated by spaces. A room is a folder."""
