"""Chat templates in the manner of models in use, in our own words, and a small tokenizer that knows their tokens.

What matters of each is kept: what it writes around turns, what it strips, which messages it refuses, and what it does with
thoughts and tools.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else SYSTEM) }}
    {{- '# Tools\n<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- elif SYSTEM %}
    {{- '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' }}
{%- endif %}"""
_QWEN_RESULTS = """
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}"""
QWEN2 = (  # a system prompt of its own; arguments as a dict
    "{%- set SYSTEM = 'You are Qwen.' %}"
    + _QWEN_TOOLS
    + """
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{ '\n' + m.content }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}"""
    + _QWEN_RESULTS
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # the last answer has a thought, empty or not; `enable_thinking=False` puts the empty one into the prompt
    "{%- set SYSTEM = '' %}"
    + _QWEN_TOOLS
    + """
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for m in messages[::-1] %}
    {%- if not ns.found and m.role == 'user' %}
        {%- set ns.found = true %}{% set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\n' if not loop.first or content else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}"""
    + _QWEN_RESULTS
    + """
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)
R1 = """
{%- set ns = namespace(system='', after_tool=false) %}
{%- for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{% set ns.after_tool = false %}{{ '<|User|>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' and m['content'] is none %}
        {{- '<|Assistant|>' }}
        {%- for call in m['tool_calls'] %}
            {{- '<|call|>' + call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'] %}
        {%- if STRIPS and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- ('<|results_end|>' if ns.after_tool else '<|Assistant|>') + content + eos_token }}
        {%- set ns.after_tool = false %}
    {%- elif m['role'] == 'tool' %}
        {{- ('' if ns.after_tool else '<|results|>') + '<|result|>' + m['content'] }}
        {%- set ns.after_tool = true %}
    {%- endif %}
{%- endfor %}
{%- if ns.after_tool %}{{ '<|results_end|>' }}
{%- elif add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
R1_DISTILL = "{%- set STRIPS = true %}" + R1  # thoughts of all answers are left out
R1_KEEPING = "{%- set STRIPS = false %}" + R1
LLAMA2 = (  # a space before the end; the system prompt within the first question; turns must alternate
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% set content = m['content'] %}"
    "{% if loop.first and messages[0]['role'] == 'system' %}"
    "{% set content = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + content %}{% endif %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}"
    "{{ (bos_token if loop.first else '') + text + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = """{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- if tools and m == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}{{ '{"function": {"name": "' + tool.function.name + '"}}' }}{% endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m['content'] + '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have 9') }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
    {%- elif m['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (  # ends a whole conversation with EOS
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {  # name: (template, EOS, the token that ends an answer)
    "ChatML": (CHATML, "<|im_end|>", "<|im_end|>"),
    "ChatML on a base model": (CHATML, "</s>", "<|im_end|>"),
    "Qwen2.5": (QWEN2, "<|im_end|>", "<|im_end|>"),
    "Qwen3": (QWEN3, "<|im_end|>", "<|im_end|>"),
    "R1-distill": (R1_DISTILL, "</s>", "</s>"),
    "R1, thoughts kept": (R1_KEEPING, "</s>", "</s>"),
    "Llama-2": (LLAMA2, "</s>", "</s>"),
    "Llama-3": (LLAMA3, "<|eot_id|>", "<|eot_id|>"),
    "Gemma": (GEMMA, "</s>", "<end_of_turn>"),
    "Mistral": (MISTRAL, "</s>", "</s>"),
    "Zephyr": (ZEPHYR, "</s>", "</s>"),
    "Phi-3": (PHI3, "</s>", "<|end|>"),
}
SPECIAL = tuple(
    """<s> </s> <|im_start|> <|im_end|> <|User|> <|Assistant|> <|call|> <|results|> <|result|>
<|results_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> [TOOL_CALLS]
<|user|> <|system|> <|end|>""".split()
)
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens all the same
CORPUS = ["user assistant model system two and four Paris is it sky blue weather city name arguments\n\n  x"] * 4


def byte_tokenizer(name, special=SPECIAL, not_special=NOT_SPECIAL):
    """Byte-level BPE, as Qwen's and Llama 3's."""
    template, eos, _ = TEMPLATES[name]
    core = Tokenizer(models.BPE())
    # newlines stay together, as in Llama 3 and Qwen
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s*\n+|\s+(?!\S)|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return _wrapped(core, template, eos, special, not_special)


def space_tokenizer(name, special=SPECIAL, not_special=NOT_SPECIAL, scheme="first"):
    """SentencePiece style, as Llama 2's: a space before the first word (`first`), or before every piece (`always`)."""
    template, eos, _ = TEMPLATES[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\t", "ü"]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return _wrapped(core, template, eos, special, not_special)


def _wrapped(core, template, eos, special, not_special):
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in not_special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
