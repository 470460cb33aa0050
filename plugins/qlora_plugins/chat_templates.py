"""Forms of conversations for checkpoints that carry no template of their own, and for rows that were written for one.

In all of them a text stands as it is, and `eos_token` follows each answer.
"""

from qlora_pipe.chat_template import ChatTemplate
from qlora_pipe.hookspecs import hookimpl

PLAIN = """\
{%- for message in messages -%}
    {{ message.content }}
    {%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
"""

# The two prompts of the Alpaca dataset. The space at their end is part of them.
ALPACA = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{ message.content + '\\n\\n' }}
    {%- elif message.role == 'user' -%}
        {%- if '\\n\\n### Input:\\n' in message.content -%}
            {{ 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
        {%- else -%}
            {{ 'Below is an instruction that describes a task. ' }}
        {%- endif -%}
        {{ 'Write a response that appropriately completes the request.\\n\\n### Instruction:\\n' + message.content }}
        {{- '\\n\\n### Response: ' }}
    {%- else -%}
        {{ message.content + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

GUANACO = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{ message.content + '\\n' }}
    {%- else -%}
        {%- if not (loop.first or loop.previtem.role == 'system') -%}{{ ' ' }}{%- endif -%}
        {{ ('### Human: ' if message.role == 'user' else '### Assistant: ') + message.content }}
        {%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages and messages[-1].role != 'system' -%}{{ ' ' }}{%- endif -%}
    {{ '### Assistant:' }}
{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {%- if message.role == 'assistant' and eos_token != '<|im_end|>' -%}{{ eos_token }}{%- endif -%}
    {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


@hookimpl
def register_chat_templates() -> list[ChatTemplate]:
    """Bring the four forms that most data without a template is written in."""
    return [
        ChatTemplate(name="plain", help="messages one after the other, as they are", source=PLAIN),
        ChatTemplate(name="alpaca", help="Stanford Alpaca's two prompts, with an input and without", source=ALPACA),
        ChatTemplate(name="guanaco", help="### Human: and ### Assistant:, as Guanaco was trained", source=GUANACO),
        ChatTemplate(name="chatml", help="<|im_start|>role ... <|im_end|>", source=CHATML),
    ]
