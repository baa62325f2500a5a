"""Chat templates in the ways in which published models write theirs."""

from __future__ import annotations

END = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}" + END
# As SmolLM2's: BOS begins every turn, and a prompt without a system text gets one.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nYou are helpful</s>\n' }}{% endif %}{{ '<s>' + message['role'] + '\n' + "
    "message['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# As Llama 3's: trimmed texts and a date.
LLAMA = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{%- for m in messages %}{{- m['role'] + '; Today: ' + date_string + '\n' + "
    "m['content'] | trim + '</s>' }}{%- endfor %}"
)
# As templates of models that can think, and as files with line breaks and blocks that are cut.
THINKING = PLAIN + "{% if enable_thinking %}<think>{% endif %}"
LINES = (
    "  {%- for m in messages %}\n    {%- if m.role == 'system' %}\n{{ m.content }}\n"
    "    {%- else %}\n<u>{{ m.content | trim }}\n  {%- endif %}\n{% endfor %}\n"
)
