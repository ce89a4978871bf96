"""Small files in the schemas of the published sets: their columns and types, problems made up."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dapo_row(index: int, prompt: str, answer: str) -> dict:
    """One row of BytedTsinghua-SIA/DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"solve it.\n\n{prompt}\n\nend with answer:", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-{index:04d}"},
    }


def dapo_rows(count: int, copies: int = 1) -> list[dict]:
    return [dapo_row(index, f"what is {index} + 1?", str(index + 1)) for index in range(count)] * (
        copies
    )


def hothan_row(index: int) -> dict:
    """One row of Hothan/OlympiadBench, OE_TO_maths_en_COMP."""
    images = {f"image_{number}": None for number in range(1, 10)}
    return {
        "id": 1600 + index,
        "question": f"find all n with n^2 = {index * index}.",
        "solution": [f"Clearly $n = \\pm {index}$."],
        "final_answer": [f"$\\frac{{{index}}}{{1}}$,-{index}"],
        "context": "let n be an integer." if index % 2 else None,
        **images,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": True,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Number Theory",
        "subject": "Math",
        "language": "English",
    }


def rows_of(publisher: str, count: int) -> list[dict]:
    """Rows as one publisher ships them; problem i is "what is i + 1?"."""
    problems = [f"what is {index} + 1?" for index in range(count)]
    match publisher:
        case "BytedTsinghua-SIA/DAPO-Math-17k":
            return dapo_rows(count, copies=3)
        case "BytedTsinghua-SIA/AIME-2024":
            rows = dapo_rows(count)
            return [
                row | {"extra_info": {"index": index, "raw_problem": problem, "split": "test"}}
                for index, (row, problem) in enumerate(zip(rows, problems, strict=True))
            ] * 32
        case "HuggingFaceH4/aime_2024":
            return [
                {
                    "id": 60 + index,
                    "problem": problem,
                    "solution": "",
                    "answer": f"{index + 1:03d}",
                    "url": "",
                    "year": "2024",
                }
                for index, problem in enumerate(problems)
            ]
        case "Maxwell-Jia/AIME_2024":
            return [
                {"ID": f"2024-I-{index}", "Problem": p, "Solution": "", "Answer": index + 1}
                for index, p in enumerate(problems)
            ]
        case "math-ai/aime25" | "yentinglin/aime_2025":
            return [
                {"problem": problem, "answer": str(index + 1), "id": str(index)}
                for index, problem in enumerate(problems)
            ]
        case "opencompass/AIME2025":
            return [
                {"question": problem, "answer": f"{index + 1}^\\circ"}
                for index, problem in enumerate(problems)
            ]
        case "math-ai/amc23":
            return [
                {"id": index, "question": problem, "answer": f"{index + 1}.0", "url": ""}
                for index, problem in enumerate(problems)
            ]
        case "HuggingFaceH4/MATH-500":
            return [
                {
                    "problem": problem,
                    "solution": "",
                    "answer": f"\\frac{{{index + 1}}}{{1}}",
                    "subject": "Algebra",
                    "level": 2,
                    "unique_id": f"test/algebra/{index}.json",
                }
                for index, problem in enumerate(problems)
            ]
        case "math-ai/minervamath":
            return [
                {"question": problem, "answer": f"{index + 1}e-3"}
                for index, problem in enumerate(problems)
            ]
        case "Hothan/OlympiadBench":
            return [hothan_row(index) for index in range(count)]
        case "openai/gsm8k":
            return [
                {"question": problem, "answer": f"{index} + 1.\n#### {index + 1:,}"}
                for index, problem in enumerate(problems)
            ]
    raise ValueError(publisher)
