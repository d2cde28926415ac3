"Package metadata comes from settings.ini, the one place where it is kept."

import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def requirements(key: str) -> list[str]:
    "The requirements listed under `key`."
    return shlex.split(settings.get(key, ''))


readme = root / 'README.md'
applications = requirements('applications_requirements')
imagenet = requirements('imagenet_requirements')
book = requirements('book_requirements') + applications

setuptools.setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    keywords=settings['keywords'],
    author=settings['author'],
    author_email=settings['author_email'],
    license='Apache-2.0',
    license_files=['LICENSE', 'dfkd_nb/weights/*.NOTICE.txt'],
    url=settings['git_url'],
    long_description=readme.read_text(encoding='utf-8')
    if readme.exists()
    else settings['description'],
    long_description_content_type='text/markdown',
    packages=setuptools.find_packages(include=['dfkd_nb', 'dfkd_nb.*']),
    package_data={
        'dfkd_nb': [
            'py.typed',
            'recipes/*.toml',
            'recipes/compare/*.toml',
            'weights/*',
            'assets/*',
        ]
    },
    python_requires='>=' + settings['min_python'],
    install_requires=requirements('requirements'),
    extras_require={
        'applications': applications,
        'book': book,
        'imagenet': imagenet,
        'networks': requirements('networks_requirements'),
        'dev': book + imagenet + requirements('dev_requirements'),
    },
    entry_points={
        'console_scripts': requirements('console_scripts'),
        'nbdev': [f'{settings["lib_name"]}={settings["lib_path"]}._modidx:d'],
    },
    zip_safe=False,
)
