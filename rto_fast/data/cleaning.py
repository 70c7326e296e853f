"""Examples that occur twice, and prompts that stand on both sides of a split."""

from rto_fast.data.messages import as_messages, message_text, said


def prompt_key(prompt):
    """Equal for prompts that are the same but for case and whitespace; text is the same as one message from the user."""
    turns = ((message["role"], message_text(message)) for message in as_messages(prompt))
    return tuple((role, " ".join(text.casefold().split())) for role, text in turns)


def without_duplicates(examples):
    """The first of each set of examples whose prompt and responses are equal to the letter."""
    unique = {}
    for example in examples:
        parts = (example.prompt, example.response, example.chosen, example.rejected)
        unique.setdefault(repr([*map(said, parts), example.tools]), example)
    return list(unique.values())


def without_prompts_of(examples, others):
    """The examples whose prompt (as `prompt_key` sees it) is in none of `others`."""
    taken = {prompt_key(other.prompt) for other in others}
    return [example for example in examples if prompt_key(example.prompt) not in taken]


def repeated_prompts(examples):
    """How many prompts occur more than once."""
    counts = {}
    for example in examples:
        key = prompt_key(example.prompt)
        counts[key] = counts.get(key, 0) + 1
    return sum(count > 1 for count in counts.values())
