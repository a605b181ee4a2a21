"""Chat templates in the manners that model families have, each also with the assistant's turns marked.

`marked(template)` says by `{% generation %}` what the plain one leaves to be found: one is the other's oracle.
"""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}<G>{{ m['content'] + '<|im_end|>' }}</G>"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims what is said, opens with BOS, has an end of turn that is not EOS.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}<G>{{ (m['content'] | trim) + '<|eot|>' }}</G>"
    "{% else %}{{ (m['content'] | trim) + '<|eot|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# Refuses a system message and roles that do not alternate; has another name for the assistant.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<|head|>model\n' }}<G>{{ (m['content'] | trim) + '<|eot|>' }}</G>"
    "{% else %}{{ '<|head|>user\n' + (m['content'] | trim) + '<|eot|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}"
)
# No generation prompt: the answer follows the question's end, with a blank, and EOS.
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<G>{{ ' ' + m['content'] + eos_token }}</G>{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
# Writes thoughts into the last turn and takes them out of earlier ones: a message reads otherwise when it is last.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}<G>{% if loop.last and '</think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' + m['content'] }}{% elif loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}{{ '<|im_end|>' }}</G>"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALL = {
    "chatml": CHATML,
    "headers": HEADERS,
    "strict": STRICT,
    "instructions": INSTRUCTIONS,
    "thinking": THINKING,
}


def plain(template):
    return template.replace("<G>", "").replace("</G>", "")


def marked(template):
    return template.replace("<G>", "{% generation %}").replace("</G>", "{% endgeneration %}")


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}
